"""Hyperparameters that a checkpoint can hold and everyone can read: plain values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# What stands in a checkpoint in place of an argument that holds an object.
NOT_SAVED = "an object, which is not saved: give it again"


def without_objects(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns hyperparameters of which every one is plain or :data:`NOT_SAVED`.

    An object, such as a teacher with its weights, would be pickled into the checkpoint, which could
    then be neither read with ``weights_only=True`` nor resumed.

    Args:
        hyperparameters: Name -> value.

    Returns:
        Name -> value of None, bools, numbers, strings, and lists, tuples and dicts of these.

    Raises:
        ValueError: If a value is :data:`NOT_SAVED`: it comes from such a checkpoint.

    Examples:
        >>> without_objects({"lr": np.float64(0.1), "backbone": object(), "loss": {"eps": 1e-4}})
        {'lr': 0.1, 'backbone': 'an object, which is not saved: give it again', 'loss': {'eps': 0.0001}}
    """
    saved = {}
    for name, value in hyperparameters.items():
        if isinstance(value, str) and value == NOT_SAVED:
            raise ValueError(
                f"{name} was given as an object or holds one, which the checkpoint does not; give "
                f"it again: load_from_checkpoint(path, {name}=...)."
            )
        try:
            saved[name] = _plain(value)
        except TypeError:
            saved[name] = NOT_SAVED
    return saved


def _plain(value: Any) -> Any:
    """Returns a value of Python's own types, also where it was one of numpy's or OmegaConf's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} is no plain value.")

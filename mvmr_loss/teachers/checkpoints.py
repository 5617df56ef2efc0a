"""Weights out of checkpoint files, wherever they are in them."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)
# The first whose reading of tensors alone is not known to be unsafe: CVE-2026-24747.
_MENDED = (2, 10)


def load_checkpoint(
    module: nn.Module, path: str | os.PathLike[str], prefix: str | None = None
) -> None:
    """Loads a network's weights out of a checkpoint file, wherever they are in it.

    The file holds a state dict, itself or under a key such as ``state_dict``, in which the network
    may be a part with a prefix (``backbone.``, ``module.``, ``visual.``). Other entries are
    ignored; every weight of the network must be there, but for BatchNorm's counts of batches, which
    older files lack. Nothing but tensors and plain containers is unpickled.

    Args:
        module: The network, loaded in place.
        path: File written by ``torch.save`` or safetensors.
        prefix: Prefix of the network's weights; None finds it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read safely, or the weights are missing, of other shapes,
            or there several times.
        ImportError: If safetensors is needed and missing.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
        >>> network = nn.Linear(2, 1)
        >>> state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
        >>> torch.save({"epoch": 3, "state_dict": state}, path)
        >>> loaded = nn.Linear(2, 1)
        >>> load_checkpoint(loaded, path)
        >>> torch.equal(loaded.weight, network.weight)
        True
    """
    path = Path(path).expanduser()
    state = _read_state(path)
    wanted = module.state_dict()
    needed = without_counts(wanted)
    if prefix is None:
        prefix = _find_prefix(needed, state, path)
    found = {key: state[prefix + key] for key in wanted if prefix + key in state}
    missing = [prefix + key for key in needed if key not in found]
    if missing:
        raise ValueError(
            f"{path} must have all weights of the network but lacks {some(missing)}; it has "
            f"{some(list(state))}. Check the model, its options, and prefix."
        )
    wrong = [key for key in found if found[key].shape != wanted[key].shape]
    if wrong:
        raise ValueError(
            f"{path} must have weights of the network's shapes but {prefix + wrong[0]} has "
            f"{tuple(found[wrong[0]].shape)} there, {tuple(wanted[wrong[0]].shape)} in the network; "
            "check the model and its options."
        )
    module.load_state_dict({**wanted, **found})


def without_counts(keys: Iterable[str]) -> list[str]:
    """Returns the names of a state dict that are not BatchNorm's counts, by which no feature changes.

    torch itself does without them, which files from before torch 0.4.1 lack.
    """
    return [key for key in keys if not key.endswith("num_batches_tracked")]


def _read_state(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a checkpoint file."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file but {path} does not exist.")
    if path.suffix == ".safetensors":
        try:
            content: Any = import_library("safetensors.torch", "safetensors").load_file(path)
        except Exception as error:  # Its own error class is not importable on all versions.
            if isinstance(error, ImportError):
                raise
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    else:
        content = load_tensors(path)
    for key in ("state_dict", "model_state_dict", "model", "teacher", "ema"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not state:
        raise ValueError(f"{path} must hold a state dict but holds a {type(content).__name__}.")
    return state


def load_tensors(path: Path) -> Any:
    """Reads what ``torch.save`` wrote; nothing but tensors and plain containers is unpickled.

    torch before 2.10 can be made to corrupt memory by a crafted file all the same; there a warning of
    the logger ``mvmr_loss`` says so, once.

    Raises:
        ValueError: If the file is damaged, or holds objects, which would run code.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch does not compare the checksums, and loads weights of flipped bits.
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} does not match its checksum")
        _warn_of_torch(torch.__version__)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # Which one depends on the bytes of a damaged file.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a file of tensors: it is damaged, or holds objects that "
            "would run code when loaded; save the state dict alone, with "
            f"torch.save(network.state_dict(), ...). ({reason})"
        ) from error


@contextmanager
def refusing_objects(what: str) -> Iterator[None]:
    """Runs a library's reading of weights; says of its refusal of objects what it means.

    Args:
        what: What is read, for the error.

    Raises:
        ValueError: If there are objects in it, which would run code.
    """
    try:
        yield
    except Exception as error:  # Libraries wrap what torch raises.
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, UnpicklingError):
            inner = inner.__cause__ or inner.__context__
        if inner is None:
            raise
        raise ValueError(
            f"{what} cannot be read as tensors: a file is damaged, or holds objects that would run "
            f"code when loaded; use safetensors. ({str(inner).splitlines()[0]})"
        ) from error


@functools.cache
def _warn_of_torch(version: str) -> None:
    """Warns once of a torch whose ``weights_only`` is not enough."""
    if tuple(int(part) for part in version.split(".")[:2]) < _MENDED:
        _logger.warning(
            "torch %s can be made to corrupt memory by a crafted checkpoint file (CVE-2026-24747, "
            "mended in torch 2.10): read files that you trust, or safetensors.",
            version,
        )


def _find_prefix(wanted: Sequence[str], state: Mapping[str, Tensor], path: Path) -> str:
    """Returns the prefix under which all the wanted weights are; "" if none has all."""
    if not wanted or all(key in state for key in wanted):
        return ""
    first = wanted[0]
    ends = [key[: -len(first)] for key in state if key.endswith(f".{first}")]
    prefixes = [p for p in ends if all(p + key in state for key in wanted)]
    if len(prefixes) > 1:
        raise ValueError(
            f"{path} has the network's weights several times, so prefix must be given: one of "
            f"{', '.join(prefixes)}."
        )
    return prefixes[0] if prefixes else ""


def import_library(module: str, package: str) -> Any:
    """Imports an optional library."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this teacher needs {package}: pip install {package}") from error


def some(keys: Sequence[str]) -> str:
    """Returns the first of many names."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

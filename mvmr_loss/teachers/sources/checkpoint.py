"""Teachers from a checkpoint file and one's own function."""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from mvmr_loss.teachers.checkpoints import load_checkpoint
from mvmr_loss.teachers.sources.request import Loaded, Request


def from_checkpoint(request: Request) -> Loaded:
    """Builds a network by one's own function and loads a checkpoint file into it.

    It is taken as it is: nothing is known of its classifier and preprocessing.
    """
    module_name, colon, function_name = request.name("one's own").partition(":")
    if not colon:
        raise ValueError(
            f"model must be 'package.module:function', which builds the network, "
            f"but is {request.model!r}."
        )
    if request.weights is None:
        raise ValueError("weights must be a checkpoint file but are None.")
    path = Path(request.weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a checkpoint file but {path} does not exist.")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model must be 'package.module:function' but {request.model!r} "
            f"cannot be imported: {error}."
        ) from error
    network = function(**request.options)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"model {request.model!r} must build a torch.nn.Module but gave a "
            f"{type(network).__name__}."
        )
    load_checkpoint(network, path, request.prefix)
    return network, lambda: None

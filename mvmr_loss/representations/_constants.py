"""Tensors that are a function of plain values alone: filters, bases, signs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

P = ParamSpec("P")
R = TypeVar("R")


def constant(
    maxsize: int,
) -> Callable[[Callable[P, R]], Callable[Concatenate[torch.device, P], R]]:
    """Keeps what a function of hashable arguments makes on the CPU, as ordinary tensors.

    The function is called outside of inference mode, autograd, ``torch.func``'s transforms, fake
    tensors and other modes, whatever the first call is made in: what is kept serves all later calls.
    To a compiler it is a constant of the graph, not a computation in it.

    Decorated, the function takes the device of the tensors before its arguments. Of its results the
    ``maxsize`` last used are kept.

    Examples:
        >>> @constant(maxsize=8)
        ... def ramp(size):
        ...     return torch.arange(size)
        >>> ramp(torch.device("cpu"), 3)
        tensor([0, 1, 2])
    """

    def decorate(make: Callable[P, R]) -> Callable[Concatenate[torch.device, P], R]:
        @functools.lru_cache(maxsize)
        def kept(device: torch.device, *args: Any) -> Any:
            return _to(device, cast("Any", make)(*args))

        def constant_tuple(device: torch.device, *args: Any) -> tuple[Any]:
            fake = _fake_mode()
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.device("cpu"),
                _disable_current_modes(),
                temporarily_clear_interpreter_stack(),
            ):
                made = kept(torch.device("cpu") if fake else device, *args)
            # The device of a fake tensor need not be there: a copy of the CPU's goes to it.
            if fake:
                made = _to(device, tree_map_only(Tensor, fake.from_tensor, made))
            # In a tuple: a compiler takes two bare tensors of one function for the same.
            return (made,)

        # As torch.compiler.assume_constant_result does, which would import torch's compiler for it.
        constant_tuple._dynamo_marked_constant = True  # type: ignore[attr-defined]

        @functools.wraps(make)
        def call(device: torch.device, *args: Any) -> Any:
            return constant_tuple(device, *args)[0]

        return cast("Callable[Concatenate[torch.device, P], R]", call)

    return decorate


def _to(device: torch.device, made: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(device), made)


def _fake_mode() -> Any:
    """Returns the FakeTensorMode that is on, or None."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return None
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    modes = _get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, FakeTensorMode)), None)

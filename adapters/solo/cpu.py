"""Running code that asks for a GPU where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaOnCPU(TorchFunctionMode):
    """Where it is active, tensors and modules that are sent to a GPU stay on the CPU.

    Examples:
        >>> with CudaOnCPU():
        ...     x, layer = torch.ones(1).cuda(non_blocking=True), torch.nn.Linear(1, 1).to("cuda:0")
        >>> x.device, layer.weight.device
        (device(type='cpu'), device(type='cpu'))
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls ``func`` with the CPU in place of a GPU."""
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(a) for a in args)
            kwargs = {key: _on_cpu(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _on_cpu(value: Any) -> Any:
    """Returns the CPU for a GPU, anything else as it is."""
    is_device = isinstance(value, (str, torch.device))
    return torch.device("cpu") if is_device and str(value).startswith("cuda") else value

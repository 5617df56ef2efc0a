"""The scattering transform with kymatio's interface."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvmr_loss._checks import (
    check_bool,
    check_choice,
    check_float_tensor,
    check_int,
    without_autocast,
)
from mvmr_loss.representations._scattering_filters import filter_bank, padded_size
from mvmr_loss.representations.base import check_images, check_size
from mvmr_loss.representations.scattering import _scatter, check_scattering_options, scattering

# What kymatio kept its filters as, in a model's checkpoint.
_KYMATIO_FILTER = re.compile(r"tensor\d+$")
# So many padded images are worked on at once.
_SLICE = 8


class Scattering2D(nn.Module):
    """Scattering with the call and the output of ``kymatio.torch.Scattering2D``, version 0.3.0.

    In place of ``from kymatio.torch import Scattering2D``, whose import fails with SciPy 1.17 or newer,
    write ``from mvmr_loss.representations import Scattering2D``. Numbers and the order of paths are
    kymatio's, within 1e-5 relative for L up to 8. What differs:

    - there is no ``backend``; everything else is by kymatio's names and defaults;
    - a ValueError or TypeError tells of bad input, where kymatio has a RuntimeError;
    - the input need not be contiguous, may be float64 and may be empty of leading dimensions; half
      precision is computed in float32;
    - there are no buffers: nothing is in the ``state_dict``, and kymatio's filters in a model's old
      checkpoint are passed over.

    Temporary memory is bounded, and a CPU does it in a fraction of the time, see
    :func:`~mvmr_loss.representations.scattering`, which this is but for the shapes.

    Source: Bruna and Mallat, "Invariant scattering convolution networks", IEEE TPAMI 35(8), 2013,
    section 2; Andreux et al., "Kymatio: scattering transforms in Python", JMLR 21(60), 2020, for the
    interface.

    Args:
        J: Logarithm to base 2 of the scale in pixels, at least 1.
        shape: Height and width (M, N) of the images, at least 2^J.
        L: Number of angles over a half turn.
        max_order: 1 or 2.
        pre_pad: If True, images are padded already, to the multiples of 2^J that leave at least 2^J in
            all beyond (M, N): to 2^J (M // 2^J + 2) by 2^J (N // 2^J + 2).
        out_type: "array", or "list": a list of the paths, each a dict of ``coef``, of shape
            (..., M // 2^J, N // 2^J), and of ``j``, ``n`` and ``theta``, the tuples of the wavelets'
            scales, numbers and angles.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range, or the shape smaller than 2^J.

    Examples:
        >>> import torch
        >>> from mvmr_loss.representations import Scattering2D
        >>> scattering = Scattering2D(J=2, shape=(32, 32))
        >>> scattering(torch.rand(10, 3, 32, 32)).shape
        torch.Size([10, 3, 81, 8, 8])
        >>> last = Scattering2D(2, (32, 32), L=4, out_type="list")(torch.rand(32, 32))[-1]
        >>> last["coef"].shape, last["j"], last["n"], last["theta"]
        (torch.Size([8, 8]), (0, 1), (3, 7), (3, 3))
    """

    def __init__(
        self,
        J: int,
        shape: Sequence[int],
        L: int = 8,
        max_order: int = 2,
        pre_pad: bool = False,
        out_type: Literal["array", "list"] = "array",
    ) -> None:
        super().__init__()
        self.J, self.L, self.max_order = check_scattering_options(J, L, max_order)
        if not isinstance(shape, Sequence) or len(shape) != 2:
            raise ValueError(f"shape must be (height, width) but is {shape!r}.")
        height, width = (check_int("shape", length, minimum=1) for length in shape)
        check_size(height, width, 2**self.J, "shape")
        self.shape = height, width
        self.pre_pad = check_bool("pre_pad", pre_pad)
        self.out_type = check_choice("out_type", out_type, ("array", "list"))

    def forward(self, x: Tensor) -> Any:
        """Computes the scattering coefficients.

        Args:
            x: Tensor of shape (..., M, N).

        Returns:
            Tensor of shape (..., K, M // 2^J, N // 2^J), K as of
            :func:`~mvmr_loss.representations.scattering`; or the list of ``out_type``.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If its size is another, or, on a CPU, a value is not finite.
        """
        expected = self.shape
        if self.pre_pad:
            expected = padded_size(self.shape[0], self.J), padded_size(self.shape[1], self.J)
        if tuple(check_float_tensor("x", x).shape[-2:]) != expected:
            padded = ", padded already," if self.pre_pad else ""
            raise ValueError(
                f"x must have shape (..., {expected[0]}, {expected[1]}){padded} but has "
                f"{tuple(x.shape)}."
            )
        if 0 in x.shape:
            raise ValueError(f"x must not be empty but has shape {tuple(x.shape)}.")
        flat = check_images(x.reshape(-1, 1, *expected), name="x")
        function = self._scatter_padded if self.pre_pad else scattering
        coefficients: Tensor = function(flat, self.J, self.L, self.max_order)
        coefficients = coefficients.reshape(*x.shape[:-2], *coefficients.shape[-3:])
        return coefficients if self.out_type == "array" else self._paths(coefficients)

    scattering = forward

    def _scatter_padded(self, x: Tensor, J: int, L: int, max_order: int) -> Tensor:
        bank = filter_bank(x.device, *self.shape, J, L, x.dtype)
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
        bank = bank._replace(rows=rows, columns=columns)
        with without_autocast(x):
            return torch.cat([_scatter(part, bank, max_order) for part in x[:, 0].split(_SLICE)])

    def _paths(self, coefficients: Tensor) -> list[dict[str, Any]]:
        """Returns the coefficients of each path with what it went through."""
        wavelets = list(itertools.product(range(self.J), range(self.L)))
        numbers: list[tuple[int, ...]] = [(), *((n,) for n in range(len(wavelets)))]
        if self.max_order == 2:
            pairs = itertools.product(range(len(wavelets)), repeat=2)
            numbers += [(a, b) for a, b in pairs if wavelets[a][0] < wavelets[b][0]]
        return [
            {
                "coef": coefficients[..., path, :, :],
                "j": tuple(wavelets[n][0] for n in through),
                "n": through,
                "theta": tuple(wavelets[n][1] for n in through),
            }
            for path, through in enumerate(numbers)
        ]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        for key in list(state_dict):
            if key.startswith(prefix) and _KYMATIO_FILTER.match(key[len(prefix) :]):
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Returns the arguments, for printing."""
        names = ("J", "shape", "L", "max_order", "pre_pad", "out_type")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

"""The scattering transform's C++ kernel for CPUs, which is done without where it cannot be compiled."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mvmr_loss._cpu.build import load_library

_LANES = 8  # as in the source


class ScatteringKernel:
    """The kernel with the filters of one setting: orders 1 and 2 of float32 images on a CPU.

    Args:
        wavelets: For each scale j the real spectra of the L wavelets, of shape (L, P1, P2).
        low_pass: For each scale j one period of the low-pass of the rows' direction at resolution
            2^-j, of shape (P1 / 2^j,), and of the columns', of shape (P2 / 2^j,).
        max_order: 1 or 2.
        shape: Height and width of the coefficients.
    """

    def __init__(
        self,
        wavelets: Sequence[Tensor],
        low_pass: Sequence[tuple[Tensor, Tensor]],
        max_order: int,
        shape: tuple[int, int],
    ) -> None:
        library = load_library("scattering")
        if library is None:
            raise RuntimeError("the kernel of the scattering transform cannot be compiled here")
        J, (L, height, width) = len(wavelets), wavelets[0].shape
        missing = -L % _LANES
        of_image = [
            # What the inverse FFT divides by is in the weights.
            torch.nn.functional.pad(spectra / (height * width), (0, 0, 0, 0, 0, missing))
            .unflatten(0, (-1, _LANES))
            .movedim(1, -1)
            for spectra in wavelets
        ]
        of_fields = [
            _low_frequencies(spectra, height >> i, width >> i) / ((height >> i) * (width >> i))
            if max_order == 2 and j > i
            else torch.empty(0)
            for i in range(J)
            for j, spectra in enumerate(wavelets)
        ]
        columns, rows = zip(*low_pass, strict=True)
        # The library reads this memory for as long as the scatterer lives.
        self._filters = [
            [tensor.to(torch.float32).contiguous() for tensor in tensors]
            for tensors in (of_image, of_fields, rows, columns)
        ]
        sizes = (ctypes.c_int * 7)(height, width, *shape, J, L, max_order)
        pointers = [
            (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() or None for tensor in tensors))
            for tensors in self._filters
        ]
        self._run = library.scatterer_run
        self._scatterer = library.scatterer_new(sizes, *pointers)
        if not self._scatterer:
            raise MemoryError("there is no memory for the filters of the scattering transform")
        weakref.finalize(self, library.scatterer_delete, self._scatterer)

    def __call__(self, spectra: Tensor, out: Tensor) -> None:
        """Writes the coefficients of orders 1 and 2.

        Args:
            spectra: Complex64 tensor of shape (B, P1, P2), the padded images' DFT.
            out: Contiguous float32 tensor of shape (B, K, h, w); its first path, order 0, is left
                as it is.

        Raises:
            MemoryError: If there is no memory for the working space.
        """
        spectra = spectra.contiguous()
        failed = self._run(
            self._scatterer,
            spectra.data_ptr(),
            out.data_ptr(),
            len(spectra),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("there is no memory for the scattering transform")


def _low_frequencies(spectra: Tensor, height: int, width: int) -> Tensor:
    """Returns the lowest frequencies, of even numbers, of spectra (L, P1, P2)."""
    rows, columns = (
        torch.cat([torch.arange(size // 2), torch.arange(full - size // 2, full)])
        for size, full in ((height, spectra.shape[1]), (width, spectra.shape[2]))
    )
    return spectra[:, rows[:, None], columns]

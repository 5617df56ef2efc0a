"""The filters of the scattering transform: Morlet wavelets, and a Gaussian low-pass as matrices."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mvmr_loss.representations._constants import constant

# The design of kymatio's filter bank: the width of the smallest Gaussian in pixels, the frequency of
# the finest wavelet in radians a pixel, and the value of pi in the normalisation, kept because it
# scales the coefficients by 3e-5 per filter, more than the 1e-5 to which the two agree.
_SIGMA = 0.8
_FREQUENCY = 3 * math.pi / 4
_NORMALIZATION = math.pi / 3.1415

# Parts of a wavelet's spectrum below this fraction of its peak are not multiplied: they are under
# the rounding error of float32, and leaving them out saves most of the work for coarse scales.
_NEGLIGIBLE = 1e-9


class Wavelets(NamedTuple):
    """The L wavelets of one scale, as they meet a spectrum of ``step`` times their resolution.

    Attributes:
        step: The subsampling: a spectrum of P frequencies an axis falls on Q = P / step.
        aliases: The blocks of Q x Q frequencies, of step x step, in which the wavelets are not zero.
        weights: Tensor of shape (L, len(aliases), 2 Q1 Q2); each real weight is there twice, for the
            real and the imaginary part that it multiplies.
    """

    step: int
    aliases: tuple[int, ...]
    weights: Tensor


class FilterBank(NamedTuple):
    """All that is fixed for an image size.

    Attributes:
        rows: Index tensor of shape (P1,): the padded image's rows in terms of the image's.
        columns: Index tensor of shape (P2,), likewise.
        wavelets: For the resolution 2^-i of a spectrum, the wavelets of scales j = i ... J - 1.
        low_pass: For the resolution 2^-j of a field, the matrices of shape (h, P1 / 2^j) and
            (P2 / 2^j, w) that blur, subsample to 2^-J and crop it, along the rows and the columns.
    """

    rows: Tensor
    columns: Tensor
    wavelets: tuple[tuple[Wavelets, ...], ...]
    low_pass: tuple[tuple[Tensor, Tensor], ...]


def padded_size(size: int, J: int) -> int:
    """Returns the length, a multiple of 2^J, that leaves a border of one coefficient each side."""
    return (size // (1 << J) + 2) << J


def _reflected_indices(size: int, padded: int) -> Tensor:
    """Returns the (padded,) indices that extend ``size`` samples by reflection about the edges."""
    index = torch.arange(padded) - (padded - size) // 2
    index = index.remainder(2 * (size - 1))
    return torch.minimum(index, 2 * (size - 1) - index)


def _frequencies(size: int) -> Tensor:
    """Returns the (5, size) angular frequencies of a DFT with their aliases up to the second.

    Sampling a function in space repeats its spectrum every 2 pi; the filters are Gaussians in
    frequency, narrow enough for two repetitions on each side to hold all of float64's digits that
    matter.
    """
    cycles: Tensor = torch.fft.fftfreq(size, dtype=torch.float64) + torch.arange(-2.0, 3.0)[:, None]
    return cycles.mul_(2 * math.pi)


def _morlet(height: int, width: int, j: int, theta: int, L: int) -> Tensor:
    """Returns the real spectrum of a Morlet wavelet, a tensor of shape (height, width).

    In space it is a Gaussian envelope, ``L / 4`` times as long across the wave as along it, times a
    plane wave less the constant that makes its mean zero; so in frequency it is a Gaussian about
    the wave's frequency less the multiple of that about zero which makes it vanish there.
    """
    angle = (max(L // 2 - 1, 0) - theta) * math.pi / L
    sigma, frequency = _SIGMA * 2**j, _FREQUENCY / 2**j
    rows = _frequencies(height)[:, None, :, None]
    columns = _frequencies(width)[None, :, None, :]
    along = rows * math.cos(angle) + columns * math.sin(angle)
    across = (columns * math.cos(angle) - rows * math.sin(angle)) * (L / 4)
    envelope = torch.exp(-(sigma**2) / 2 * (along**2 + across**2)).sum(dim=(0, 1))
    gabor = torch.exp(-(sigma**2) / 2 * ((along - frequency) ** 2 + across**2)).sum(dim=(0, 1))
    return _NORMALIZATION * (gabor - gabor[0, 0] / envelope[0, 0] * envelope)


# Kept for one size: the plain filters and the kernel's are made one after the other.
@lru_cache(maxsize=1)
def morlets(height: int, width: int, J: int, L: int) -> tuple[Tensor, ...]:
    """Returns for each scale the spectra of the L wavelets, of shape (L, height, width)."""
    return tuple(
        torch.stack([_morlet(height, width, j, theta, L) for theta in range(L)]) for j in range(J)
    )


def _low_frequencies(spectrum: Tensor, size: int, dim: int) -> Tensor:
    """Returns the ``size`` lowest frequencies, of even number, of a spectrum along a dimension."""
    low = spectrum.narrow(dim, 0, size // 2)
    return torch.cat([low, spectrum.narrow(dim, spectrum.shape[dim] - size // 2, size // 2)], dim)


def _wavelets(spectra: Tensor, resolution: int, j: int) -> Wavelets:
    """Prepares the spectra of scale j, of shape (L, P1, P2), for fields of resolution 2^-i."""
    _, height, width = spectra.shape
    spectra = _low_frequencies(spectra, height >> resolution, 1)
    spectra = _low_frequencies(spectra, width >> resolution, 2)
    step = 2 ** (j - resolution)
    # The inverse DFT of a spectrum folded step times on itself is the field subsampled by step.
    blocks = alias_blocks(spectra, step) / step**2
    peaks = blocks.abs().amax(dim=(0, 2))
    aliases = tuple(int(i) for i in (peaks > _NEGLIGIBLE * peaks.max()).nonzero().flatten())
    return Wavelets(step, aliases, blocks[:, list(aliases)].repeat_interleave(2, dim=-1))


def alias_blocks(spectrum: Tensor, step: int) -> Tensor:
    """Splits a spectrum (..., P1, P2) into its step x step blocks: (..., step^2, Q1 Q2).

    The blocks are what falls on each other when the field is subsampled.
    """
    height, width = spectrum.shape[-2] // step, spectrum.shape[-1] // step
    blocks: Tensor = spectrum.unflatten(-1, (step, width)).unflatten(-3, (step, height))
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def low_pass_kernel(size: int, J: int, j: int) -> Tensor:
    """Returns one period, of shape (size / 2^j,), of one axis' low-pass at resolution 2^-j."""
    sigma = _SIGMA * 2 ** (J - 1)
    spectrum = torch.exp(-((sigma * _frequencies(size)) ** 2) / 2).sum(dim=0)
    spectrum = math.sqrt(_NORMALIZATION) * _low_frequencies(spectrum, size >> j, 0)
    kernel: Tensor = torch.fft.ifft(spectrum).real
    return kernel


def _low_pass_matrix(size: int, J: int, j: int) -> Tensor:
    """Returns the matrix (size // 2^J - 2, size / 2^j) of one axis' low-pass for resolution 2^-j.

    Blurring with the Gaussian, subsampling to resolution 2^-J and cropping the border are linear
    and separable.
    """
    kernel = low_pass_kernel(size, J, j)
    kept = (torch.arange((size >> J) - 2) + 1) * 2 ** (J - j)
    return kernel[(kept[:, None] - torch.arange(size >> j)).remainder(size >> j)]


@constant(maxsize=32)
def filter_bank(height: int, width: int, J: int, L: int, dtype: torch.dtype) -> FilterBank:
    padded = padded_size(height, J), padded_size(width, J)
    spectra = morlets(*padded, J, L)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous()

    wavelets = tuple(tuple(_wavelets(spectra[j], i, j) for j in range(i, J)) for i in range(J))
    return FilterBank(
        rows=_reflected_indices(height, padded[0]),
        columns=_reflected_indices(width, padded[1]),
        wavelets=tuple(
            tuple(bank._replace(weights=rounded(bank.weights)) for bank in banks)
            for banks in wavelets
        ),
        low_pass=tuple(
            (
                rounded(_low_pass_matrix(padded[0], J, j)),
                rounded(_low_pass_matrix(padded[1], J, j).T),
            )
            for j in range(J)
        ),
    )

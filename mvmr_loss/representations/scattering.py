"""The scattering transform of Mallat (2012) with the Morlet wavelets of Bruna and Mallat (2013)."""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mvmr_loss._checks import check_choice, check_int
from mvmr_loss._cpu import can_run
from mvmr_loss._cpu.build import load_library
from mvmr_loss._cpu.scattering import ScatteringKernel
from mvmr_loss.representations._constants import constant
from mvmr_loss.representations.base import (
    Representation,
    check_images,
    follows_derivative,
    without_autocast,
)
from mvmr_loss.representations.registry import register_representation

# The design of kymatio's filter bank: the width of the smallest Gaussian in pixels, the frequency of
# the finest wavelet in radians a pixel, and the value of pi in the normalisation, kept because it
# scales the coefficients by 3e-5 per filter, more than the 1e-5 to which the two agree.
_SIGMA = 0.8
_FREQUENCY = 3 * math.pi / 4
_NORMALIZATION = math.pi / 3.1415

# Parts of a wavelet's spectrum below this fraction of its peak are not multiplied: they are under
# the rounding error of float32, and leaving them out saves most of the work for coarse scales.
_NEGLIGIBLE = 1e-9

# The largest temporary of one slice in complex numbers: small enough for a processor's cache on a
# CPU, or in the kernel for memory that is used again, and large enough to fill an accelerator.
_SLICE_CPU = 2**19
_SLICE_KERNEL = 2**18
_SLICE_ACCELERATOR = 2**25


class _Wavelets(NamedTuple):
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


class _FilterBank(NamedTuple):
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
    wavelets: tuple[tuple[_Wavelets, ...], ...]
    low_pass: tuple[tuple[Tensor, Tensor], ...]


def check_scattering_options(J: int, L: int, max_order: int) -> tuple[int, int, int]:
    """Returns the options of :func:`scattering` as ints, checked."""
    J, L = check_int("J", J, minimum=1), check_int("L", L, minimum=1)
    return J, L, check_choice("max_order", check_int("max_order", max_order), (1, 2))


def _padded_size(size: int, J: int) -> int:
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
def _morlets(height: int, width: int, J: int, L: int) -> tuple[Tensor, ...]:
    """Returns for each scale the spectra of the L wavelets, of shape (L, height, width)."""
    return tuple(
        torch.stack([_morlet(height, width, j, theta, L) for theta in range(L)]) for j in range(J)
    )


def _low_frequencies(spectrum: Tensor, size: int, dim: int) -> Tensor:
    """Returns the ``size`` lowest frequencies, of even number, of a spectrum along a dimension."""
    low = spectrum.narrow(dim, 0, size // 2)
    return torch.cat([low, spectrum.narrow(dim, spectrum.shape[dim] - size // 2, size // 2)], dim)


def _wavelets(spectra: Tensor, resolution: int, j: int) -> _Wavelets:
    """Prepares the spectra of scale j, of shape (L, P1, P2), for fields of resolution 2^-i."""
    _, height, width = spectra.shape
    spectra = _low_frequencies(spectra, height >> resolution, 1)
    spectra = _low_frequencies(spectra, width >> resolution, 2)
    step = 2 ** (j - resolution)
    # The inverse DFT of a spectrum folded step times on itself is the field subsampled by step.
    blocks = _alias_blocks(spectra, step) / step**2
    peaks = blocks.abs().amax(dim=(0, 2))
    aliases = tuple(int(i) for i in (peaks > _NEGLIGIBLE * peaks.max()).nonzero().flatten())
    return _Wavelets(step, aliases, blocks[:, list(aliases)].repeat_interleave(2, dim=-1))


def _alias_blocks(spectrum: Tensor, step: int) -> Tensor:
    """Splits a spectrum (..., P1, P2) into its step x step blocks: (..., step^2, Q1 Q2).

    The blocks are what falls on each other when the field is subsampled.
    """
    height, width = spectrum.shape[-2] // step, spectrum.shape[-1] // step
    blocks: Tensor = spectrum.unflatten(-1, (step, width)).unflatten(-3, (step, height))
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _low_pass_kernel(size: int, J: int, j: int) -> Tensor:
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
    kernel = _low_pass_kernel(size, J, j)
    kept = (torch.arange((size >> J) - 2) + 1) * 2 ** (J - j)
    return kernel[(kept[:, None] - torch.arange(size >> j)).remainder(size >> j)]


@constant(maxsize=32)
def _filter_bank(height: int, width: int, J: int, L: int, dtype: torch.dtype) -> _FilterBank:
    padded = _padded_size(height, J), _padded_size(width, J)
    spectra = _morlets(*padded, J, L)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous()

    wavelets = tuple(tuple(_wavelets(spectra[j], i, j) for j in range(i, J)) for i in range(J))
    return _FilterBank(
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


@lru_cache(maxsize=32)
def _build_kernel(
    height: int, width: int, J: int, L: int, max_order: int
) -> ScatteringKernel | None:
    if load_library("scattering") is None:
        return None
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        padded = _padded_size(height, J), _padded_size(width, J)
        return ScatteringKernel(
            _morlets(*padded, J, L),
            [
                (_low_pass_kernel(padded[0], J, j), _low_pass_kernel(padded[1], J, j))
                for j in range(J)
            ],
            max_order,
            (height // 2**J, width // 2**J),
        )


def _modulus(field: Tensor) -> Tensor:
    """Returns the modulus of a complex tensor; its gradient is 0 where the modulus is."""
    if follows_derivative(field):
        return field.abs()
    # The same without care for overflow and for gradients, in a third of the time.
    squares = torch.view_as_real(field).square()
    return (squares[..., 0] + squares[..., 1]).sqrt_()


def _wavelet_modulus(spectrum: Tensor, wavelets: _Wavelets) -> Tensor:
    """Convolves fields with the L wavelets of a scale, subsamples, and takes the modulus.

    Of the fields' DFT (..., P1, P2) it makes (..., L, P1 / step, P2 / step). The multiplication by
    the wavelet and the folding that subsamples are one: no product of full resolution is stored.
    """
    size = spectrum.shape[-2] // wavelets.step, spectrum.shape[-1] // wavelets.step
    blocks = torch.view_as_real(_alias_blocks(spectrum, wavelets.step)).flatten(-2).unsqueeze(-3)
    first, *others = wavelets.aliases
    folded = blocks[..., first, :] * wavelets.weights[:, 0]
    for i, alias in enumerate(others, 1):
        folded.addcmul_(blocks[..., alias, :], wavelets.weights[:, i])
    folded = torch.view_as_complex(folded.unflatten(-1, (*size, 2)))
    return _modulus(torch.fft.ifft2(folded))


def _pad(images: Tensor, bank: _FilterBank) -> Tensor:
    """Extends images (B, H, W) by reflection to (B, P1, P2)."""
    return images.index_select(-2, bank.rows).index_select(-1, bank.columns)


def _low_pass(field: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Blurs, subsamples and crops real fields of shape (..., P1, P2) to (..., h, w)."""
    rows, columns = matrices
    return rows @ field @ columns


def _scatter(images: Tensor, bank: _FilterBank, max_order: int) -> Tensor:
    """Scatters single-channel images (B, H, W) to (B, K, h, w)."""
    padded = _pad(images, bank)
    spectrum = torch.fft.fft2(padded)
    order_0 = _low_pass(padded, bank.low_pass[0])[:, None]
    order_1, order_2 = [], []
    for j1, wavelets in enumerate(bank.wavelets[0]):
        field = _wavelet_modulus(spectrum, wavelets)
        order_1.append(_low_pass(field, bank.low_pass[j1]))
        coarser = bank.wavelets[j1][1:]
        if max_order == 2 and coarser:
            spectra = torch.fft.fft2(field)
            paths = [
                _low_pass(_wavelet_modulus(spectra, wavelets), bank.low_pass[j2])
                for j2, wavelets in enumerate(coarser, j1 + 1)
            ]
            order_2.append(torch.cat(paths, dim=2).flatten(1, 2))
    return torch.cat([order_0, *order_1, *order_2], dim=1)


def _scatter_by_kernel(
    images: Tensor, bank: _FilterBank, kernel: ScatteringKernel, out: Tensor
) -> None:
    """The same as :func:`_scatter` by the C++ kernel, written to ``out``."""
    padded = _pad(images, bank)
    out[:, 0] = _low_pass(padded, bank.low_pass[0])
    kernel(torch.fft.fft2(padded), out)


def scattering(images: Tensor, J: int = 2, L: int = 8, max_order: int = 2) -> Tensor:
    """Computes the scattering transform of images, channel by channel.

    With the Morlet wavelets psi of scale 2^j and angle theta, and a Gaussian phi of scale 2^J, the
    orders are x * phi, |x * psi_1| * phi and ||x * psi_1| * psi_2| * phi for j2 > j1, subsampled by
    2^J. The images are extended by reflection. Equal to kymatio 0.3.0 within 1e-5 relative for L up
    to 8, in its order of paths: order 0; order 1 by scale, then angle; order 2 by the first
    wavelet's scale and angle, then the second's.

    Works in slices of the batch, so that temporary memory is bounded (unless a gradient is
    recorded, which takes longer, too). Float32 images on a CPU go through a kernel in C++ three times
    as fast, if the machine has a compiler (GCC or Clang): it is compiled at the first call, in some
    seconds, and kept in the user's cache; ``MVMR_LOSS_NATIVE=0`` in the environment forbids it. The
    numbers are float32's where the device multiplies matrices in it; TensorFloat-32, if switched
    on, leaves about 1e-3.

    Source: Mallat, "Group invariant scattering", Comm. Pure Appl. Math. 65(10), 2012; Bruna and
    Mallat, "Invariant scattering convolution networks", IEEE TPAMI 35(8), 2013, section 2. The
    module is :class:`Scattering`.

    Args:
        images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image; height and width at
            least 2^J.
        J: Logarithm to base 2 of the scale in pixels, at least 1.
        L: Number of angles over a half turn, at least 1.
        max_order: 1 or 2.

    Returns:
        Tensor of shape (N, C, K, H // 2^J, W // 2^J), float32 (float64 for float64 images), with
        K = 1 + J L, and J (J - 1) / 2 L^2 more of order 2.

    Examples:
        >>> ramp = torch.arange(16.0).expand(1, 3, 16, 16)
        >>> coefficients = scattering(ramp, J=2, L=4)
        >>> coefficients.shape
        torch.Size([1, 3, 25, 4, 4])
        >>> coefficients[0, 0, 0, 0].round(decimals=2)
        tensor([ 1.2500,  4.0000,  8.0000, 11.9700])
    """
    J, L, max_order = check_scattering_options(J, L, max_order)
    images = check_images(images, 2**J)
    function = _scattering_on_cpu if can_run(images) else _scattering
    coefficients: Tensor = function(images, J, L, max_order)
    return coefficients


def _scattering(images: Tensor, J: int, L: int, max_order: int) -> Tensor:
    planes, bank = _planes(images, J, L)
    largest = len(bank.rows) * len(bank.columns) * L * (max(1, L // 4) if max_order == 2 else 1)
    slice_size = max(1, (_SLICE_CPU if images.is_cpu else _SLICE_ACCELERATOR) // largest)
    with without_autocast(images):
        parts = [_scatter(part, bank, max_order) for part in planes.split(slice_size)]
    scattered: Tensor = torch.cat(parts).unflatten(0, images.shape[:2])
    return scattered


def _planes(images: Tensor, J: int, L: int) -> tuple[Tensor, _FilterBank]:
    """Returns the channels of all images (N C, H, W), and the filters for them."""
    # The filters are made for one size: a compiler that lets it vary must know.
    height, width = (operator.index(length) for length in images.shape[-2:])
    bank = _filter_bank(images.device, height, width, J, L, images.dtype)
    return images.reshape(-1, height, width), bank


@torch.library.custom_op("mvmr_loss::scattering", mutates_args=())
def _scattering_on_cpu(images: Tensor, J: int, L: int, max_order: int) -> Tensor:
    kernel = None
    if images.dtype == torch.float32:
        kernel = _build_kernel(*images.shape[-2:], J, L, max_order)
    if kernel is None:
        return _scattering(images, J, L, max_order)
    planes, bank = _planes(images.resolve_neg(), J, L)
    slice_size = max(
        _SLICE_KERNEL // (len(bank.rows) * len(bank.columns)), 4 * torch.get_num_threads()
    )
    scattered = planes.new_empty(
        len(planes), *scattering_shape(*images.shape[-2:], J, L, max_order)
    )
    with torch.no_grad(), without_autocast(images):
        for part, out in zip(planes.split(slice_size), scattered.split(slice_size), strict=True):
            _scatter_by_kernel(part, bank, kernel, out)
    return scattered.unflatten(0, images.shape[:2])


@_scattering_on_cpu.register_fake
def _(images: Tensor, J: int, L: int, max_order: int) -> Tensor:
    count, channels, height, width = images.shape
    return images.new_empty(count, channels, *scattering_shape(height, width, J, L, max_order))


def scattering_shape(
    height: int, width: int, J: int = 2, L: int = 8, max_order: int = 2
) -> tuple[int, int, int]:
    """Returns the shape (K, H // 2^J, W // 2^J) of one channel's :func:`scattering`.

    Examples:
        >>> scattering_shape(96, 96)
        (81, 24, 24)
    """
    J, L, max_order = check_scattering_options(J, L, max_order)
    paths = 1 + J * L + (J * (J - 1) // 2 * L**2 if max_order == 2 else 0)
    return paths, height // 2**J, width // 2**J


@register_representation("scattering")
class Scattering(Representation):
    """Module form of :func:`scattering`, with the same options.

    Args:
        J, L, max_order: As in :func:`scattering`.
        differentiable: If True, the gradient flows through to the images.

    Examples:
        >>> Scattering()(torch.ones(2, 3, 32, 32)).shape
        torch.Size([2, 3, 81, 8, 8])
        >>> Scattering().output_shape(3, 96, 96)
        (3, 81, 24, 24)
    """

    def __init__(
        self, J: int = 2, L: int = 8, max_order: int = 2, *, differentiable: bool = False
    ) -> None:
        super().__init__(differentiable=differentiable)
        self.J, self.L, self.max_order = check_scattering_options(J, L, max_order)
        self.minimum_size = 2**self.J

    def extract(self, images: Tensor) -> Tensor:
        return scattering(images, self.J, self.L, self.max_order)

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        return (channels, *scattering_shape(height, width, self.J, self.L, self.max_order))

    def extra_repr(self) -> str:
        return f"J={self.J}, L={self.L}, max_order={self.max_order}"

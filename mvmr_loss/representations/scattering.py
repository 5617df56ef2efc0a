"""The scattering transform of Mallat (2012) with the Morlet wavelets of Bruna and Mallat (2013)."""

from __future__ import annotations

import operator
from functools import lru_cache

import torch
from torch import Tensor

from mvmr_loss._checks import check_choice, check_int, without_autocast
from mvmr_loss._cpu import can_run
from mvmr_loss._cpu.build import load_library
from mvmr_loss._cpu.scattering import ScatteringKernel
from mvmr_loss.representations._scattering_filters import (
    FilterBank,
    Wavelets,
    alias_blocks,
    filter_bank,
    low_pass_kernel,
    morlets,
    padded_size,
)
from mvmr_loss.representations.base import (
    Representation,
    check_images,
    follows_derivative,
)
from mvmr_loss.representations.registry import register_representation

# The largest temporary of one slice in complex numbers: small enough for a processor's cache on a
# CPU, or in the kernel for memory that is used again, and large enough to fill an accelerator.
_SLICE_CPU = 2**19
_SLICE_KERNEL = 2**18
_SLICE_ACCELERATOR = 2**25


def check_scattering_options(J: int, L: int, max_order: int) -> tuple[int, int, int]:
    """Returns the options of :func:`scattering` as ints, checked."""
    J, L = check_int("J", J, minimum=1), check_int("L", L, minimum=1)
    return J, L, check_choice("max_order", check_int("max_order", max_order), (1, 2))


@lru_cache(maxsize=32)
def _build_kernel(
    height: int, width: int, J: int, L: int, max_order: int
) -> ScatteringKernel | None:
    if load_library("scattering") is None:
        return None
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        padded = padded_size(height, J), padded_size(width, J)
        return ScatteringKernel(
            morlets(*padded, J, L),
            [
                (low_pass_kernel(padded[0], J, j), low_pass_kernel(padded[1], J, j))
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


def _wavelet_modulus(spectrum: Tensor, wavelets: Wavelets) -> Tensor:
    """Convolves fields with the L wavelets of a scale, subsamples, and takes the modulus.

    Of the fields' DFT (..., P1, P2) it makes (..., L, P1 / step, P2 / step). The multiplication by
    the wavelet and the folding that subsamples are one: no product of full resolution is stored.
    """
    size = spectrum.shape[-2] // wavelets.step, spectrum.shape[-1] // wavelets.step
    blocks = torch.view_as_real(alias_blocks(spectrum, wavelets.step)).flatten(-2).unsqueeze(-3)
    first, *others = wavelets.aliases
    folded = blocks[..., first, :] * wavelets.weights[:, 0]
    for i, alias in enumerate(others, 1):
        folded.addcmul_(blocks[..., alias, :], wavelets.weights[:, i])
    folded = torch.view_as_complex(folded.unflatten(-1, (*size, 2)))
    return _modulus(torch.fft.ifft2(folded))


def _pad(images: Tensor, bank: FilterBank) -> Tensor:
    """Extends images (B, H, W) by reflection to (B, P1, P2)."""
    return images.index_select(-2, bank.rows).index_select(-1, bank.columns)


def _low_pass(field: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Blurs, subsamples and crops real fields of shape (..., P1, P2) to (..., h, w)."""
    rows, columns = matrices
    return rows @ field @ columns


def _scatter(images: Tensor, bank: FilterBank, max_order: int) -> Tensor:
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
    images: Tensor, bank: FilterBank, kernel: ScatteringKernel, out: Tensor
) -> None:
    """The same as :func:`_scatter` by the C++ kernel, written to ``out``."""
    padded = _pad(images, bank)
    out[:, 0] = _low_pass(padded, bank.low_pass[0])
    kernel(torch.fft.fft2(padded), out)


def scattering(images: Tensor, J: int = 2, L: int = 8, max_order: int = 2) -> Tensor:
    """Computes the scattering transform of images, channel by channel.

    With the Morlet wavelets psi of scale 2^j and angle theta, and a Gaussian phi of scale 2^J, the
    orders are ``x * phi``, ``|x * psi_1| * phi`` and ``||x * psi_1| * psi_2| * phi`` for j2 > j1,
    subsampled by 2^J. The images are extended by reflection. Equal to kymatio 0.3.0 within 1e-5
    relative for L up to 8, in its order of paths: order 0; order 1 by scale, then angle; order 2 by
    the first wavelet's scale and angle, then the second's.

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
        images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image, of any finite values, but
            that in float32 the result is NaN for those from 1e19 on, whose squares leave the range;
            height and width at least 2^J.
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


def _planes(images: Tensor, J: int, L: int) -> tuple[Tensor, FilterBank]:
    """Returns the channels of all images (N C, H, W), and the filters for them."""
    # The filters are made for one size: a compiler that lets it vary must know.
    height, width = (operator.index(length) for length in images.shape[-2:])
    bank = filter_bank(images.device, height, width, J, L, images.dtype)
    return images.reshape(-1, height, width), bank


@torch.library.custom_op("mvmr_loss::scattering", mutates_args=())
def _scattering_on_cpu(images: Tensor, J: int, L: int, max_order: int) -> Tensor:
    kernel = None
    if images.dtype == torch.float32:
        kernel = _build_kernel(*images.shape[-2:], J, L, max_order)
    if kernel is None:
        return _scattering(images, J, L, max_order)
    height, width = images.shape[-2:]
    planes, bank = _planes(images.resolve_neg(), J, L)
    slice_size = max(
        _SLICE_KERNEL // (len(bank.rows) * len(bank.columns)), 4 * torch.get_num_threads()
    )
    scattered = planes.new_empty(len(planes), *scattering_shape(height, width, J, L, max_order))
    with torch.no_grad(), without_autocast(images):
        for part, out in zip(planes.split(slice_size), scattered.split(slice_size), strict=True):
            _scatter_by_kernel(part, bank, kernel, out)
    coefficients: Tensor = scattered.unflatten(0, images.shape[:2])
    return coefficients


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

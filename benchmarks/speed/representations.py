"""Time of each representation beside the libraries that compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.timing import Times, interleaved
from mvmr_loss.representations import DCT, HOG, LocalStd, Scattering


def photographs(n: int, size: int, device: torch.device) -> Tensor:
    """Returns real image content: crops of a photograph, shape (n, 3, size, size), in [0, 1]."""
    from skimage.data import astronaut

    image = torch.from_numpy(astronaut()).permute(2, 0, 1).float().div(255)
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 512 - size, (n, 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for y, x in corners]).to(device)


def scattering(size: int, device: torch.device, repeats: int, n: int = 32) -> dict[str, Any]:
    """Times scattering J=2, L=8 beside kymatio's torch backend.

    Args:
        size: Height and width of the images.
        device: Where to run.
        repeats: Timed rounds.
        n: Number of images.

    Returns:
        Under ``times`` the seconds of each round, and under ``error`` the relative error.
    """
    # kymatio 0.3.0's top-level import fails on SciPy >= 1.17.
    from kymatio.scattering2d.backend.torch_backend import backend
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

    images = photographs(n, size, device)
    ours = Scattering(J=2, L=8).to(device)
    theirs = ScatteringTorch2D(J=2, L=8, shape=(size, size), backend=backend).to(device)
    mine, reference = ours(images), theirs(images)
    error = ((mine.reshape(reference.shape) - reference).norm() / reference.norm()).item()
    times = interleaved(
        {"mvmr-loss": lambda: ours(images), "kymatio 0.3.0": lambda: theirs(images)},
        device,
        repeats=repeats,
    )
    return {"times": times, "error": error}


def handcrafted(size: int, device: torch.device, repeats: int) -> dict[str, Times]:
    """Times HOG, local standard deviation and DCT beside scikit-image, SciPy and plain torch.

    The peers compute what is nearest to ours: scikit-image's HOG has hard bins and another gradient.

    Args:
        size: Height and width of the images, of which there are 64.
        device: Where ours and the torch peers run; the others run on the CPU.
        repeats: Timed rounds.

    Returns:
        Representation -> name -> seconds of each round.
    """
    import numpy as np
    from scipy import fft, ndimage
    from skimage.feature import hog

    images = photographs(64, size, device)
    arrays = images.cpu().numpy()

    def skimage_hog() -> Any:
        return [
            hog(channel, orientations=24, pixels_per_cell=(8, 8), cells_per_block=(1, 1))
            for image in arrays
            for channel in image
        ]

    def scipy_std() -> Any:
        mean = ndimage.uniform_filter(arrays, (1, 1, 3, 3))
        return np.sqrt(np.maximum(ndimage.uniform_filter(arrays**2, (1, 1, 3, 3)) - mean**2, 0))

    ours: dict[str, Any] = {"hog": HOG(), "local_std": LocalStd(), "dct": DCT()}
    peers: dict[str, dict[str, Callable[[], Any]]] = {
        "hog": {
            "scikit-image, each image": skimage_hog,
            "torch, one-hot bins": lambda: torch_hog(images),
        },
        "local_std": {
            "SciPy, whole batch": scipy_std,
            "torch, unfold": lambda: torch_local_std(images),
        },
        "dct": {
            "SciPy, whole batch": lambda: fft.dctn(arrays, axes=(-2, -1), norm="ortho"),
            "torch, by FFT": lambda: torch_dct(torch_dct(images).mT).mT,
        },
    }
    return {
        name: interleaved(
            {"mvmr-loss": lambda module=module: module(images), **peers[name]},
            device,
            repeats=repeats,
        )
        for name, module in ours.items()
    }


def torch_hog(images: Tensor) -> Tensor:
    """The usual HOG in torch: Sobel by convolution, votes into one-hot bins, average pooling."""
    n, c, h, w = images.shape
    kernel = images.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    weight = torch.stack([kernel, kernel.T])[:, None]
    padded = F.pad(images.reshape(n * c, 1, h, w), (1, 1, 1, 1), mode="replicate")
    gx, gy = F.conv2d(padded, weight).unbind(1)
    magnitude = torch.sqrt(gx**2 + gy**2)
    position = torch.atan2(gy, gx).remainder(math.pi) * (24 / math.pi)
    lower = position.floor()
    fraction = position - lower
    votes = images.new_zeros(n * c, 24, h, w)
    votes.scatter_add_(1, (lower.long() % 24)[:, None], (magnitude * (1 - fraction))[:, None])
    votes.scatter_add_(1, ((lower.long() + 1) % 24)[:, None], (magnitude * fraction)[:, None])
    return F.avg_pool2d(votes, 8)


def torch_local_std(images: Tensor) -> Tensor:
    """Local standard deviation by unfolding every window."""
    n, c, h, w = images.shape
    windows = F.unfold(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3)
    return windows.view(n, c, 9, h, w).std(dim=2, unbiased=False)


def torch_dct(x: Tensor) -> Tensor:
    """DCT-II along the last dimension by an FFT of the reordered sequence (Makhoul, 1980)."""
    n = x.shape[-1]
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1))
    k = torch.arange(n, device=x.device) * (-math.pi / (2 * n))
    y = spectrum.real * torch.cos(k) - spectrum.imag * torch.sin(k)
    scale = torch.full((n,), math.sqrt(2 / n), device=x.device)
    scale[0] = math.sqrt(1 / n)
    return y * scale

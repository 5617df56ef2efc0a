"""Representations computed once per image and read back by sample index."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvmr_loss._version import __version__
from mvmr_loss.cache.dataset import dataset_fingerprint
from mvmr_loss.cache.store import RepresentationCache
from mvmr_loss.representations.base import Representation, check_images
from mvmr_loss.representations.registry import Representations

# Rounding to half precision and another device's arithmetic stay below 1%; other normalisations,
# options, weights or images are far above.
_TOLERANCE = 0.03


class CachedRepresentations(nn.Module):
    """Representations that are computed once per image and then read back by sample index.

    Called with images and their indices in the data set. Rows that are in the store are read;
    missing ones are computed from the images and stored, so the first epoch fills the store; what
    is not cacheable, like ``augmented_pixels``, is computed live. All values of cacheable
    representations come from the store, rounded to its type, also when they were just computed.

    Two checks guard against features of other images or settings. The store holds the
    representations of a fixed test image, which must be what ``representations`` computes now:
    other options, weights or versions are found out. And one drawn row of every batch with
    images is compared with a live one: so are another normalisation, other images, or a view that
    is not the same in every epoch.

    Args:
        representations: What to compute and store. None reads what is in the store at ``path``,
            without any network or computation.
        path: Folder of the store; created at the first call if there is none.
        dataset: The data set, for its length and :func:`dataset_fingerprint` where ``num_samples``
            and ``fingerprint`` are not given.
        num_samples: Number of samples of the data set. Needed unless ``representations`` is None
            or the data set is given.
        image_shape: Channels, height and width of the images. None means the first batch's.
        fingerprint: Of the data set, see :func:`dataset_fingerprint`; any string will do. A store
            of another fingerprint is refused.
        normalization: Mean and standard deviation per channel that the images are normalised with,
            kept in the metadata; a store of another normalisation is refused.
        dtype: Type of the stored numbers: torch.float16, torch.bfloat16 or torch.float32.

    Attributes:
        cache: The store, or None before the first call made it.

    Raises:
        TypeError: If ``representations`` is not a Representations.
        ValueError: If an argument is missing, nothing is cacheable, or the store is of other
            settings.
        OSError: If the store is damaged, or the disk is full or may not be written.

    Examples:
        >>> import tempfile
        >>> images = torch.rand(8, 3, 32, 32)
        >>> representations = Representations(["pixels", "local_std"], sketch_dim=1024)
        >>> cached = CachedRepresentations(representations, tempfile.mkdtemp(), num_samples=8)
        >>> computed = cached(images, torch.arange(8))
        >>> read = cached(None, torch.tensor([2, 5]))
        >>> {name: tuple(y.shape) for name, y in read.items()}
        {'pixels': (2, 1024), 'local_std': (2, 1024)}
        >>> torch.equal(read["pixels"], computed["pixels"][[2, 5]])
        True
    """

    def __init__(
        self,
        representations: Representations | None,
        path: str | os.PathLike[str],
        *,
        dataset: Any = None,
        num_samples: int | None = None,
        image_shape: Sequence[int] | None = None,
        fingerprint: str | None = None,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.path = Path(path).absolute()
        if dataset is not None:
            fingerprint = dataset_fingerprint(dataset) if fingerprint is None else fingerprint
            num_samples = len(dataset) if num_samples is None else num_samples
        self.num_samples, self.fingerprint, self.dtype = num_samples, fingerprint, dtype
        self.normalization = None if normalization is None else [list(v) for v in normalization]
        self.cache: RepresentationCache | None = None
        self.stored: Representations | None = None
        self.live: Representations | None = None
        # A generator of its own: the training's random numbers stay what they are.
        self._draw = random.Random()
        if representations is None:
            self.cache = RepresentationCache(self.path)
            self._names = list(self.cache.widths)
            self._check_identity(self.cache)
            return
        if not isinstance(representations, Representations):
            raise TypeError(
                "representations must be a mvmr_loss.Representations or None "
                f"but is a {type(representations).__name__}."
            )
        if num_samples is None:
            raise ValueError("dataset or num_samples, its length, must be given.")
        self._names = list(representations.by_name)
        self.stored = _part(representations, cacheable=True)
        self.live = _part(representations, cacheable=False)
        if self.stored is None:
            raise ValueError(
                f"representations must have one that is cacheable but {', '.join(self._names)} "
                "change from call to call; compute them without a cache."
            )
        if image_shape is not None:
            self._connect(tuple(image_shape))
        elif (self.path / "metadata.json").exists():
            shape = RepresentationCache(self.path).settings.get("image_shape")
            if shape is not None:
                self._connect(tuple(shape))

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, images: Tensor | None, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Reads or computes every representation of a batch.

        Args:
            images: The non-augmented images of shape (N, C, H, W). None is enough where all rows
                are in the store and all representations are cacheable.
            indices: Each image's index in the data set, shape (N,). Best on the CPU: on an
                accelerator, reading them makes the host wait for it.

        Returns:
            Name -> tensor of shape (N, D_k), float32, on the device of the images (of the indices,
            without images).

        Raises:
            TypeError: If the images are no floating-point tensor or the indices no integers.
            ValueError: If images are needed and missing, shapes do not fit, an index is out of
                range, or the store does not belong to these images or representations.
            OSError: If the store is damaged, may not be written, or the disk is full.
        """
        if images is not None:
            images = check_images(images)
            if len(images) != len(indices):
                raise ValueError(
                    f"images and indices must be of the same number but are {len(images)} and "
                    f"{len(indices)}."
                )
        cache = self._ready(images)
        listed = cache._checked(indices)
        missing = {i: k for k, i in enumerate(listed) if not cache._entry(i)}
        if images is None and (missing or self.live is not None):
            what = (
                f"{len(missing)} of {len(listed)} rows are missing in the store at {self.path}, "
                f"the first of them {next(iter(missing))}"
                if missing
                else f"{', '.join(self.live.by_name) if self.live else ''} must be computed live"
            )
            raise ValueError(f"images must be given but are None: {what}.")
        if missing:
            if self.stored is None:
                raise ValueError(
                    f"the store at {self.path} must have all rows when it is opened without "
                    f"representations but lacks {len(missing)} of {len(listed)}; fill it first."
                )
            assert images is not None
            with torch.no_grad():
                cache._check_writable()
                cache.write(list(missing), self.stored(images[list(missing.values())]))
        if images is not None:
            device = images.device
        else:
            device = indices.device if isinstance(indices, Tensor) else torch.device("cpu")
        features = cache.read(listed, device=device)
        if images is not None and self.stored is not None:
            self._spot_check(images, listed, features, missing)
        if self.live is not None:
            assert images is not None
            features |= self.live(images)
        return {name: features[name] for name in self._names}

    def _ready(self, images: Tensor | None) -> RepresentationCache:
        """Returns the store, made for the first batch's images if need be."""
        if self.cache is None:
            if images is None:
                raise ValueError(
                    f"images must be given but are None: there is no store at {self.path} yet."
                )
            self._connect(tuple(images.shape[1:]), images.device)
        assert self.cache is not None
        shape = self.cache.settings.get("image_shape")
        if images is not None and shape is not None and list(images.shape[1:]) != shape:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, shape))}), as those of the store "
                f"at {self.path}, but have {tuple(images.shape)}."
            )
        return self.cache

    def _connect(self, image_shape: tuple[int, ...], device: torch.device | None = None) -> None:
        """Creates or opens the store, and compares the representations of the test image."""
        assert self.stored is not None
        assert self.num_samples is not None
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W) but is {image_shape}.")
        cache = RepresentationCache.create(
            self.path,
            self.stored.sizes(*image_shape),
            self.num_samples,
            dtype=self.dtype,
            settings={
                "representations": {
                    name: _describe(module) for name, module in self.stored.by_name.items()
                },
                "image_shape": image_shape,
                "normalization": self.normalization,
                "fingerprint": self.fingerprint,
            },
        )
        if device is None:
            device = next((b.device for b in self.stored.buffers()), torch.device("cpu"))
        with torch.no_grad():
            computed = self.stored(_test_image(*image_shape).to(device))
        expected = {name: values.cpu() for name, values in computed.items()}
        row = self.num_samples
        if not cache._entry(row):
            cache._write_rows([row], expected)
        found = cache._read_rows([row]).float().split(list(cache.widths.values()), dim=1)
        for name, values in zip(cache.widths, found, strict=True):
            error = _relative_error(values, expected[name])
            if error > _TOLERANCE:
                raise ValueError(
                    f"{name!r} in the store at {self.path} was computed by something else: for the "
                    f"test image it differs by {error:.0%} from what is computed now (other "
                    f"weights, options or version: made by {cache.made_by}, this is mvmr_loss "
                    f"{__version__}); use the same, or another folder."
                )
        self.cache = cache

    def _check_identity(self, cache: RepresentationCache) -> None:
        """Compares what was said of the data with an open store."""
        said = {
            "num_samples": (self.num_samples, cache.num_samples),
            "fingerprint": (self.fingerprint, cache.settings.get("fingerprint")),
            "normalization": (self.normalization, cache.settings.get("normalization")),
        }
        for name, (here, there) in said.items():
            if here is not None and here != there:
                raise ValueError(
                    f"the store at {self.path} is of other settings: {name} is {there} there but "
                    f"{here} here; use the same data and settings, or another folder."
                )

    def _spot_check(
        self,
        images: Tensor,
        indices: Sequence[int],
        features: Mapping[str, Tensor],
        computed: Mapping[int, int],
    ) -> None:
        """Compares one drawn row that was read, not computed, with a live one."""
        read = [k for k, i in enumerate(indices) if i not in computed]
        if not read:
            return
        k = self._draw.choice(read)
        assert self.stored is not None
        with torch.no_grad():
            live = self.stored(images[k : k + 1])
        for name, values in live.items():
            error = _relative_error(features[name][k : k + 1], values)
            if error > _TOLERANCE:
                raise ValueError(
                    f"row {indices[k]} of the store at {self.path} is not of this image: {name!r} "
                    f"differs by {error:.0%}; the images must be the same in every epoch (not "
                    "augmented), of the same data set, in the same order and normalised alike."
                )


def _part(representations: Representations, *, cacheable: bool) -> Representations | None:
    """Returns the representations that are cacheable, or those that are not."""
    chosen = {
        name: module
        for name, module in representations.by_name.items()
        if isinstance(module, Representation) and module.cacheable == cacheable
    }
    return Representations(chosen, slice_size=representations.slice_size) if chosen else None


def _describe(value: Any) -> Any:
    """Returns a representation's class and options, or an option, as JSON can write it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, Representation):
        options = {
            name: _describe(getattr(value, name))
            for name in inspect.signature(type(value)).parameters
            if hasattr(value, name)
        }
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **options}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _test_image(channels: int, height: int, width: int) -> Tensor:
    """Returns one image, shape (1, C, H, W), of waves of several lengths and directions.

    Its values are from 0 to 1, which is within the pixels' range for any usual normalisation.
    """
    c, y, x = torch.meshgrid(
        torch.arange(channels), torch.arange(height), torch.arange(width), indexing="ij"
    )
    waves = (
        torch.sin(0.11 * (c + 1) * y + 0.23 * x)
        + 0.7 * torch.sin(0.7 * y - 0.9 * (c + 1) * x)
        + 0.5 * torch.sin(0.01 * x * y + c)
    )
    return (0.5 + waves / 4.4)[None]


def _relative_error(a: Tensor, b: Tensor) -> float:
    """Returns the norm of the difference over the norm of ``b``."""
    difference, norm = (a - b).norm().item(), b.norm().item()
    return difference / norm if norm > 0 else float(difference > 0)

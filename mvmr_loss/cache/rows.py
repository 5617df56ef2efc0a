"""Representations computed once an image and read back by sample index: the cache of a collection."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mvmr_loss._checks import check_int
from mvmr_loss._random import uniform
from mvmr_loss._version import __version__
from mvmr_loss.cache.dataset import dataset_fingerprint, indexed_by
from mvmr_loss.cache.metadata import is_store
from mvmr_loss.cache.store import DTYPES, RepresentationCache

if TYPE_CHECKING:
    from mvmr_loss.representations.collection import Representations

# Rounding to half precision and another device's arithmetic stay below 1%; other normalisations,
# options, weights or images are far above.
_TOLERANCE = 0.03
# What all images have in common hides that: this is of what they differ by, if that is more than the
# noise of float32.
_TOLERANCE_OF_DEVIATION, _LEAST_DEVIATION = 0.1, 1e-4
# Rows that differ by less than this of their size are of the same image, computed twice.
_NO_DEVIATION = 1e-5
# What rounding an image changes is measured by noise of its size, which halves it at most by chance.
_TIMES_ROUNDING = 2.0
# Of fewer images one cannot tell how much they differ.
_SOME = 8


class CachedRows:
    """What :class:`~mvmr_loss.Representations` reads and stores where it has a ``cache``.

    Rows that are in the store are read, all others computed and stored, so that the first epoch fills
    it. Two checks guard against rows of other images or settings. The store holds the representations
    of a fixed test image, which must be what is computed now: other options, weights or versions are
    found. And rows that are read are compared now and then with live ones: so are another
    normalisation, other images, or a view that is not the same in every epoch.

    Args:
        computed: The cacheable representations; None reads whatever is in the store.
        path: Folder of the store; made when the first images come if there is none.
        dataset: The data set whose samples the indices count: its length and
            :func:`~mvmr_loss.cache.dataset_fingerprint` must be the store's.
        num_samples: Length of the data set, where the data set itself is not given.
        fingerprint: Any text that tells data sets apart, in place of the data set's own.
        image_shape: Channels, height and width of the images. None: the first batch's.
        dtype: Type of the stored numbers, ``"float16"``, ``"bfloat16"`` or ``"float32"``. None: the
            store's; float16 in a new one.
        checks_per_epoch: How many rows an epoch are compared with live ones: at most one a batch, and
            one of the first batch. 64 rows find a store of which a tenth of the images were
            replaced in its first epoch with probability 0.999, a twentieth 0.96, a hundredth 0.47.

    Attributes:
        store: The open store; None before it is there.
    """

    def __init__(
        self,
        computed: Representations | None,
        path: str | os.PathLike[str],
        *,
        dataset: Any = None,
        num_samples: int | None = None,
        fingerprint: str | None = None,
        image_shape: Sequence[int] | None = None,
        dtype: torch.dtype | str | None = None,
        checks_per_epoch: int = 64,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"cache must be a path, or have a path, but it is {path!r}.")
        if "\0" in os.fspath(path) or not os.fspath(path):
            raise ValueError(f"cache must be the path of a folder but it is {path!r}.")
        if fingerprint is not None and not isinstance(fingerprint, str):
            raise TypeError(f"the cache's fingerprint must be a string but is {fingerprint!r}.")
        if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(
                f"the cache's dtype must be one of {', '.join(DTYPES)} but is {dtype}."
            )
        self.path = Path(path).expanduser().absolute()
        self.dtype = None if dtype is None else DTYPES[str(dtype).removeprefix("torch.")]
        if num_samples is not None:
            num_samples = check_int("num_samples", num_samples, minimum=1)
        self.num_samples = num_samples
        self.fingerprint, self._fingerprint_is_given = fingerprint, fingerprint is not None
        self.checks_per_epoch = check_int("checks_per_epoch", checks_per_epoch, minimum=0)
        self.store: RepresentationCache | None = None
        self._computed = computed
        # A generator of its own: the training's random numbers stay what they are.
        self._draw, self._checks_due = random.Random(), 1.0
        # The last rows of each representation whose rounding is not judged yet.
        self._unjudged = {} if computed is None else dict.fromkeys(computed.by_name)
        if computed is None:
            self.store = RepresentationCache(self.path)
        self.open(dataset, image_shape)

    def __repr__(self) -> str:
        return f"cache={str(self.path)!r}"

    def open(self, dataset: Any = None, image_shape: Sequence[int] | None = None) -> None:
        """Learns of which data set the rows are, and opens the store if there is one."""
        before = self.num_samples, self.fingerprint
        try:
            self._open(dataset, image_shape)
        except Exception:  # What was refused is not what the next one is compared with.
            self.num_samples, self.fingerprint = before
            raise

    def _open(self, dataset: Any, image_shape: Sequence[int] | None) -> None:
        if dataset is not None:
            dataset = indexed_by(dataset)
            if self.num_samples not in (None, len(dataset)):
                raise ValueError(
                    f"dataset must have the {self.num_samples} samples of the cache at {self.path} "
                    f"but has {len(dataset)}."
                )
            self.num_samples = len(dataset)
            if not self._fingerprint_is_given:
                self.fingerprint = dataset_fingerprint(dataset)
        if image_shape is None and is_store(self.path):
            image_shape = RepresentationCache(self.path).settings.get("image_shape")
        if self.store is not None:
            self._check_identity(self.store)
        elif image_shape is not None:
            self._connect(image_shape)

    def __call__(self, images: Tensor | None, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Reads or computes the rows of a batch.

        Args:
            images: Checked images of shape (N, C, H, W); None if all rows are there.
            indices: Each image's index in the data set, shape (N,).

        Returns:
            Name -> tensor of shape (N, D_k), float32, rounded to the store's type also where it was
            just computed, on the device of the images (of the indices, without images).
        """
        store = self._ready(images)
        listed = store.check_indices(indices)
        rows = torch.tensor(listed)
        is_there = store.is_valid(rows).tolist()
        missing = {i: k for k, i in enumerate(listed) if not is_there[k]}
        if missing:
            if self._computed is None:
                raise ValueError(
                    f"the store at {self.path} must have all rows when it is opened without "
                    f"representations but lacks {len(missing)} of {len(listed)}; fill it first."
                )
            if images is None:
                raise ValueError(
                    f"images must be given but are None: {len(missing)} of {len(listed)} rows are "
                    f"missing in the store at {self.path}, the first of them {next(iter(missing))}."
                )
            store.check_writable()
            with torch.no_grad():
                computed = self._computed._compute(images[list(missing.values())])
            self._check_rounding(store, computed)
            store.write(list(missing), computed)
        if images is not None:
            device = images.device
        else:
            device = indices.device if isinstance(indices, Tensor) else torch.device("cpu")
        features = store.read(rows, device=device)
        if images is not None and self._computed is not None:
            self._spot_check(images, listed, features, is_there)
        return features

    def _ready(self, images: Tensor | None) -> RepresentationCache:
        """Returns the store, made for the first batch's images if need be."""
        if self.store is None:
            if images is None:
                raise ValueError(
                    f"images must be given but are None: there is no store at {self.path} yet."
                )
            self._connect(tuple(images.shape[1:]), images.device)
        assert self.store is not None
        shape = self.store.settings.get("image_shape")
        if images is not None and shape is not None and list(images.shape[1:]) != shape:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, shape))}), as those of the store "
                f"at {self.path}, but have {tuple(images.shape)}."
            )
        return self.store

    def _connect(self, image_shape: Sequence[int], device: torch.device | None = None) -> None:
        """Creates or opens the store, and compares the representations of the test image."""
        assert self._computed is not None
        if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W) but is {image_shape}.")
        image_shape = tuple(check_int("image_shape", n, minimum=1) for n in image_shape)
        num_samples, dtype, fingerprint = self.num_samples, self.dtype, self.fingerprint
        described = self._computed.describe()
        if is_store(self.path):  # What is not said here is the store's.
            there = RepresentationCache(self.path)
            self._check_identity(there)
            num_samples = there.num_samples
            described = _as_there(described, there.settings.get("representations"))
            fingerprint = there.settings.get("fingerprint")
            dtype = there.dtype if dtype is None else dtype
        if num_samples is None:
            raise ValueError(
                f"cache must be told the data set that the indices count, to make {self.path}: "
                "cache={'path': ..., 'dataset': dataset}, or its num_samples, or open_cache(dataset)."
            )
        normalization = self._computed.normalization
        store = RepresentationCache.create(
            self.path,
            self._computed.sizes(*image_shape),
            num_samples,
            dtype=torch.float16 if dtype is None else dtype,
            settings={
                "representations": described,
                "image_shape": image_shape,
                "normalization": (normalization.mean, normalization.std),
                "fingerprint": fingerprint,
            },
        )
        if device is None:
            device = next((b.device for b in self._computed.buffers()), torch.device("cpu"))
        with torch.no_grad():
            computed = self._computed._compute(_test_image(*image_shape).to(device))
        found = store.test_row({name: values.cpu() for name, values in computed.items()})
        for name, values in found.items():
            live = computed[name].cpu()
            error = _relative_error(values, live.to(store.dtype).to(live))
            if not error <= _TOLERANCE:
                raise ValueError(
                    f"{name!r} in the store at {self.path} was computed by something else: for the "
                    f"test image it differs by {error:.0%} from what is computed now (other "
                    f"weights, options or version: made by {store.made_by}, this is mvmr_loss "
                    f"{__version__}); use the same, or another folder."
                )
        self.store = store

    def _check_identity(self, store: RepresentationCache) -> None:
        """Compares what was said of the data with an open store."""
        said = {
            "num_samples": (self.num_samples, store.num_samples),
            "fingerprint": (self.fingerprint, store.settings.get("fingerprint")),
        }
        for name, (here, there) in said.items():
            if here is not None and there is None:
                raise ValueError(
                    f"the store at {self.path} does not say of which data set it is, for it was made "
                    "by num_samples alone; fill another folder with the data set given (or create it "
                    "with settings={'fingerprint': dataset_fingerprint(dataset)}), or open this one "
                    "by num_samples alone, too."
                )
            if here is not None and here != there:
                raise ValueError(
                    f"the store at {self.path} is of other settings: {name} is {there} there but "
                    f"{here} here; use the same data and settings, or another folder."
                )

    def _check_rounding(self, store: RepresentationCache, computed: Mapping[str, Tensor]) -> None:
        """Refuses to store features whose differences the store's type rounds away.

        Once for each representation, as soon as there are some rows that differ: those of small
        batches are gathered, and blank images do not tell.
        """
        for name, before in list(self._unjudged.items()):
            values = computed[name].cpu()
            values = values if before is None else torch.cat([before.to(values), values])
            deviation = (values - values.mean(dim=0)).norm()
            if len(values) < _SOME or not deviation > _NO_DEVIATION * values.norm():
                self._unjudged[name] = values[1 - _SOME :].clone()
                continue
            lost = (values - values.to(store.dtype).to(values)).norm()
            # What is beyond the type's range is refused where it is written.
            if _TOLERANCE * deviation < lost < torch.inf:
                raise ValueError(
                    f"the cache's dtype must keep the differences between samples but {store.dtype} "
                    f"rounds them off for {name!r}; use another folder with dtype='float32'."
                )
            del self._unjudged[name]

    def _spot_check(
        self,
        images: Tensor,
        indices: Sequence[int],
        features: Mapping[str, Tensor],
        is_there: Sequence[bool],
    ) -> None:
        """Compares a drawn row that was read, not computed, with a live one, when one is due."""
        assert self._computed is not None
        assert self.store is not None
        read = [k for k, there in enumerate(is_there) if there]
        due = self._checks_due + self.checks_per_epoch * len(read) / self.store.num_samples
        self._checks_due = due
        if not (read and self.checks_per_epoch and due >= 1):
            return
        self._checks_due = min(due - 1, 1.0)
        k = self._draw.choice(read)
        image = images[k : k + 1]
        with torch.no_grad():
            live = self._computed._compute(image)
            before = _before_rounding(image)
            # In half precision neighbours become equal, and what compares them is another: it is
            # told from another image by how much it changes.
            changed = live if before is None else self._computed._compute(before)
        others = list({i: j for j, i in enumerate(indices)}.values())
        for name, values in live.items():
            # Tiny values may be lost in the store's type: rounded alike, they are equal.
            rounded = values.to(self.store.dtype).to(values)
            row, rows = features[name][k : k + 1], features[name][others]
            free = _TIMES_ROUNDING * (changed[name] - values).norm().item()
            error, most, of = _relative_error(row, rounded, free), _TOLERANCE, ""
            if error <= most and len(rows) >= _SOME:
                deviation = (rows - rows.mean(dim=0)).norm().item() / len(rows) ** 0.5
                if deviation > _LEAST_DEVIATION * rounded.norm().item():
                    error = _difference(row, rounded, free) / deviation
                    most, of = _TOLERANCE_OF_DEVIATION, " of what images differ by"
            if not error <= most:
                raise ValueError(
                    f"row {indices[k]} of the store at {self.path} is not of this image: {name!r} "
                    f"differs by {error:.0%}{of}; the images must be the same in every epoch (not "
                    "augmented), of the same data set, in the same order, resized, normalised "
                    "and rounded alike."
                )


def _as_there(here: Any, there: Any) -> Any:
    """Returns a description with what a store's says of the device, and of the folder of weights.

    They change no feature, and that the weights are the same the test image tells.
    """
    if not (isinstance(here, Mapping) and isinstance(there, Mapping)):
        return here
    told = {key: _as_there(value, there.get(key)) for key, value in here.items()}
    for key in ("model", "weights"):  # Either may be of a path: "local-dir:FOLDER", "FOLDER/a.pt".
        a, b = told.get(key), there.get(key)
        if isinstance(a, str) and isinstance(b, str) and _last_part(a) == _last_part(b):
            told[key] = b
    if isinstance(told.get("class"), str) and "device" in there:
        told["device"] = there["device"]
    return told


def _last_part(path: str) -> str:
    return os.path.basename(path.removeprefix("local-dir:").rstrip("/"))


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


def _before_rounding(image: Tensor) -> Tensor | None:
    """Returns an image that may have been rounded to this one; None if it is not of half precision.

    By its values: hosts give images of half precision as float32, too.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(image, image.to(dtype).to(image)):
            exponent = torch.frexp(image).exponent
            step = torch.ldexp(torch.full_like(image, torch.finfo(dtype).eps / 2), exponent)
            noise = uniform(0, 0, image.numel(), image.device).to(image).view_as(image) - 0.5
            return image + noise * step * (image != 0)  # frexp tells no size of 0
    return None


def _difference(a: Tensor, b: Tensor, free: float) -> float:
    """Returns the norm of the difference beyond what is free; NaN stays."""
    difference: float = (a - b).norm().item()
    return max(difference - free, 0.0)


def _relative_error(a: Tensor, b: Tensor, free: float = 0.0) -> float:
    """Returns the norm of the difference, beyond what is free, over the norm of ``b``."""
    difference, norm = _difference(a, b, free), b.norm().item()
    return difference / norm if norm > 0 else float(difference > 0)

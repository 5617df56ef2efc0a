"""Several representations of the same images as one module: the way from images to features."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from torch import Tensor, nn

from mvmr_loss._checks import check_bool, check_int
from mvmr_loss._random import check_seed
from mvmr_loss.cache.rows import CachedRows
from mvmr_loss.normalization import Normalization, NormalizationLike, can_be_waited_for
from mvmr_loss.representations.base import Representation, check_images, check_size
from mvmr_loss.representations.registry import Specification, build, describe, labelled
from mvmr_loss.representations.sketch import Sketched

# Values of the images of a slice on an accelerator.
_SLICE_ACCELERATOR = 2**25


def _slice_size(images: Tensor) -> int:
    """Returns how many images are worked on at once where nobody says."""
    if images.is_cpu:
        return 32
    return max(32, _SLICE_ACCELERATOR // images[0].numel())


class Representations(nn.Module):
    """Several representations of the same images: computed in slices, or kept on disk.

    Built from names, or from names and options as read from a configuration file:

    - a list of names and of mappings with a ``name``: ``["pixels", {"name": "hog", "orientations": 9}]``
    - a mapping from name to options: ``{"pixels": None, "hog": {"orientations": 9}}``; a ``name``
      among the options lets the key be a label of one's own:
      ``{"fine": {"name": "hog", "pixels_per_cell": 4}, "coarse": {"name": "hog"}}``
    - a mapping may also hold :class:`~mvmr_loss.representations.Representation` objects.

    Images may have any number of channels; ``normalization`` is a pair with a number for each then.
    They are those of the non-augmented view, normalised as the network sees them. How, is
    said once, by ``normalization``, and told to every representation named that asks for it: one
    with an argument ``normalization``, or ``mean`` and ``std``. An option of these names in the
    specification takes precedence. A teacher or ``AugmentedPixels`` given as an object is told, too;
    one that states another normalisation itself is refused where ``normalization`` is given.

    Where a representation undoes the normalisation, as ``augmented_pixels`` and teachers with a
    preprocessing do, the first batch is looked at: values that cannot have been normalised so are an
    error, and images in [0, 1] that are said to be normalised are warned of.

    With a ``cache``, a call with the images' indices in the data set reads what is in the store, and
    computes and stores what is not; what is not cacheable, as ``augmented_pixels``, is computed each
    time. Without indices everything is computed, and nothing read or stored.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the multi-representation terms.

    Args:
        specification: What to compute, as above; not empty. None, with a ``cache``: all that is in
            the store, without computing anything.
        normalization: How the images were normalised: a
            :class:`~mvmr_loss.normalization.Normalization`, a pair (mean, std), ``"imagenet"``,
            ``"cifar10"``, ``"cifar100"``, ``"stl10"``, or ``"none"`` for images in [0, 1]. None:
            ImageNet's, but for objects that state their own.
        slice_size: How many images are worked on at once; bounds the temporary memory. None: 32 on a
            CPU; on an accelerator, where each slice costs as many launches as all images, as many as
            have 2**25 values.
        differentiable: If True, the gradient flows through to the images; an option of the same
            name in the specification takes precedence, and objects must be so themselves. Not with a
            ``cache``.
        sketch_dim: If given, every representation wider than this is replaced by its folded sign
            sketch of this width (:func:`~mvmr_loss.representations.folded_sign_sketch`), which nearly
            keeps the distances, all that the loss reads. None: exact.
        sketch_seed: Seed of the sketches' signs, at least 0.
        cache: Folder of a store, or a mapping with it as ``path`` and the other options of
            :class:`~mvmr_loss.cache.CachedRows`, such as ``dataset``. A store of other representations,
            images or normalisation is refused.

    Attributes:
        cache: A :class:`~mvmr_loss.cache.CachedRows`, or None.

    Examples:
        >>> import torch
        >>> representations = Representations(["pixels", {"name": "local_std", "window_size": 5}])
        >>> images = torch.rand(4, 3, 32, 32)
        >>> {name: tuple(y.shape) for name, y in representations(images).items()}
        {'pixels': (4, 3072), 'local_std': (4, 3072)}
        >>> representations.sizes(3, 96, 96)
        {'pixels': 27648, 'local_std': 27648}

        Shorter, and from the second time on read from a folder:

        >>> import tempfile
        >>> cache = {"path": tempfile.mkdtemp(), "dataset": images}
        >>> representations = Representations(["pixels", "local_std"], sketch_dim=1024, cache=cache)
        >>> computed = representations(images, torch.arange(4))
        >>> read = representations(images[2:], torch.tensor([2, 3]))
        >>> read["pixels"].shape, torch.equal(read["pixels"], computed["pixels"][2:])
        (torch.Size([2, 1024]), True)
    """

    def __init__(
        self,
        specification: Specification | None,
        *,
        normalization: NormalizationLike | None = None,
        slice_size: int | None = None,
        differentiable: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
        cache: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if slice_size is not None:
            slice_size = check_int("slice_size", slice_size, minimum=1)
        self.slice_size = slice_size
        self.normalization = Normalization.of(
            "imagenet" if normalization is None else normalization
        )
        self._normalization_is_checked = False
        check_bool("differentiable", differentiable)
        nothing = specification is None and cache is not None
        built: dict[str, Representation] = {}
        for label, value in ({} if nothing else labelled(specification)).items():
            if not isinstance(value, Representation):
                options = {"differentiable": differentiable, **value}
                built[label] = build(label, options, self.normalization)
            elif differentiable and not value.differentiable:
                raise ValueError(
                    f"differentiable must be False, as it is for the object {label}, but is True; build "
                    "the object with differentiable=True."
                )
            else:
                built[label] = self._told(label, value, normalization is not None)
        sketch_seed = check_seed(sketch_seed, "sketch_seed")
        if sketch_dim is not None:
            sketch_dim = check_int("sketch_dim", sketch_dim, minimum=1)
            built = {label: Sketched(r, sketch_dim, sketch_seed) for label, r in built.items()}
        self.by_name = nn.ModuleDict(built)
        self.cache: CachedRows | None = None
        if cache is not None:
            self.cache = CachedRows(self._cacheable(), **_cache_options(cache))

    def _told(self, label: str, given: Representation, stated: bool) -> Representation:
        """Returns an object for images normalised as said; raises if it states another normalisation."""
        told = given.undoing(self.normalization)
        own = told.undone()
        if stated and own not in (None, self.normalization):
            raise ValueError(
                f"normalization must be what {label} states of its images, {own}, but is "
                f"{self.normalization}; state it once, or alike."
            )
        return told

    def _cacheable(self) -> Representations | None:
        """Returns the representations that are kept; they share their modules with these."""
        kept: dict[str, Representation] = {}
        for name, module in cast("dict[str, Representation]", self.by_name).items():
            if module.cacheable:
                kept[name] = module
                if module.differentiable:
                    raise ValueError(
                        f"differentiable must be False with a cache but is True for {name}: what is "
                        "read has no gradient."
                    )
        if not kept and self.by_name:
            raise ValueError(
                f"representations must have one that is cacheable but {', '.join(self.by_name)} "
                "change from call to call; compute them without a cache."
            )
        if not kept:
            return None
        cacheable = Representations(kept, slice_size=self.slice_size)
        cacheable.normalization = self.normalization  # They are told already.
        return cacheable

    def forward(
        self, images: Tensor | None, indices: Tensor | Sequence[int] | int | None = None
    ) -> dict[str, Tensor]:
        """Computes every representation of a batch of images, or reads it from the cache.

        Args:
            images: Tensor of shape (N, C, H, W), or (C, H, W) for a single image. None is enough
                where all rows are in the cache and all representations are cacheable.
            indices: Each image's index in the data set, shape (N,), for the cache, or one of a single
                image; without a cache they are not needed. Best on the CPU: on an accelerator, reading
                them makes the host wait.

        Returns:
            Name -> tensor of shape (N, D_k), float32 (float64 for float64 images, where computed), on
            the device of the images (of the indices, without images).

        Raises:
            ValueError: If images are needed and missing, an index is out of range, or the cache does
                not belong to these images or representations.
            OSError: If the store is damaged, may not be written, or the disk is full.
        """
        rows = None if indices is None else _several(indices)
        if images is not None:
            images = self._checked(images)
            if rows is not None and len(images) != len(rows):
                raise ValueError(
                    f"images and indices must be of the same number but are {len(images)} and "
                    f"{len(rows)}."
                )
        if self.cache is not None and rows is not None:
            # What forbids compiling brings torch's compiler in, which takes as long as torch itself.
            from mvmr_loss.representations._cached import cached_features

            features: dict[str, Tensor] = cached_features(self, self.cache, images, rows)
            return features
        if images is None:
            raise ValueError("images must be given but are None: nothing is read without a cache.")
        if not self.by_name:
            raise ValueError("indices must be given: without a specification everything is read.")
        return self._compute(images)

    def _store(self, images: Tensor, indices: Sequence[int]) -> None:
        """Computes and stores the rows that are missing in the cache, and nothing else.

        What is not cacheable is not computed: an augmentation would be drawn for nothing.

        Args:
            images: Tensor of shape (N, C, H, W).
            indices: Each image's index in the data set.
        """
        assert self.cache is not None
        self.cache(self._checked(images), indices)

    def _checked(self, images: Tensor) -> Tensor:
        """Returns images as a batch, and looks once whether they can have been normalised as said."""
        images = check_images(images, finite=False)  # each representation looks at the values
        if not can_be_waited_for(images) or self._normalization_is_checked:
            return images
        for module in cast("dict[str, Representation]", self.by_name).values():
            undone = module.undone()
            if undone is not None:
                undone.check(images, wait=True)
        self._normalization_is_checked = True
        return images

    def _compute(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the features of checked images, computed."""
        return {name: self._in_slices(module, images) for name, module in self.by_name.items()}

    def _in_slices(self, module: nn.Module, images: Tensor) -> Tensor:
        """Returns the flattened features, each slice written at once to where it stays."""
        representation = cast(Representation, module)
        size = self.slice_size or _slice_size(images)
        first, *others = images.split(size)
        part = representation.as_rows(representation(first))
        features = part.new_empty(len(images), part.shape[1])
        features[: len(part)] = part
        for i, images_of_slice in enumerate(others, 1):
            part = representation.as_rows(representation(images_of_slice))
            features[i * size : i * size + len(part)] = part
        return features

    def open_cache(self, dataset: Any) -> None:
        """Tells the cache which data set the indices count, and opens the store if there is one.

        For who knows the data set only later, as a trainer does. Without a cache it does nothing.

        Args:
            dataset: A data set with a length. Of a subset of an
                :class:`~mvmr_loss.cache.IndexedDataset` the indices count the whole.

        Raises:
            TypeError: If the data set has no length.
            ValueError: If the store is of another data set or of other representations.
            OSError: If the store is damaged.
        """
        if self.cache is not None:
            self.cache.open(dataset)

    def sizes(self, channels: int, height: int, width: int) -> dict[str, int]:
        """Returns how many numbers D_k each representation has for one image, without running it."""
        channels, height, width = (
            check_int(name, value, minimum=1)
            for name, value in (("channels", channels), ("height", height), ("width", width))
        )
        sizes = {}
        for name, representation in cast("dict[str, Representation]", self.by_name).items():
            check_size(height, width, representation.minimum_size, f"images for {name}")
            sizes[name] = math.prod(representation.output_shape(channels, height, width))
        return sizes

    def describe(self) -> dict[str, Any]:
        """Returns the class and options of each representation, as JSON can write them."""
        return {name: describe(module) for name, module in self.by_name.items()}

    def extra_repr(self) -> str:
        return "" if self.cache is None else repr(self.cache)


def _several(indices: Tensor | Sequence[int] | int) -> Tensor | Sequence[int]:
    """Returns indices, of which there may be one, as several; raises if there is no number of them."""
    if isinstance(indices, Integral):
        return [int(indices)]
    if isinstance(indices, Tensor) and indices.ndim == 0:
        return indices[None]
    if not hasattr(indices, "__len__"):
        raise TypeError(
            f"indices must be integers of shape (N,), or one, but are a {type(indices).__name__}."
        )
    return cast("Tensor | Sequence[int]", indices)


def _cache_options(cache: object) -> dict[str, Any]:
    """Returns the options of :class:`~mvmr_loss.cache.CachedRows` from a path or a mapping."""
    if not isinstance(cache, Mapping):
        return {"path": cache}
    known = ("path", *(CachedRows.__init__.__kwdefaults__ or {}))
    unknown = [name for name in cache if name not in known]
    if unknown:
        raise TypeError(f"cache has no option {unknown[0]!r}; its options are {', '.join(known)}.")
    if "path" not in cache:
        raise ValueError(f"cache must have a path, the folder of the store, but has {list(cache)}.")
    return dict(cache)

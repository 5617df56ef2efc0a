"""Building what turns a batch's images and sample indexes into representations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision import transforms

from mvmr_loss import LossComponents, Normalization, Representations
from mvmr_loss.cache import CachedRepresentations, RepresentationCache, dataset_fingerprint

from .. import PAPER_REPRESENTATIONS  # noqa: TID252 - of the same checkout
from .checks import check_cache_exists
from .options import EXTRACTION_OPTIONS, SoloConfigError, select


def take_out(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Takes what belongs to one module out of a state dict.

    The representations are built when training starts, after a checkpoint was loaded: their state,
    such as how many augmentations were drawn, is kept until then.

    Args:
        state: Name -> tensor; what is taken is removed.
        prefix: The module's name and a dot.

    Returns:
        Name within the module -> tensor.

    Examples:
        >>> import torch
        >>> state = {"projector.weight": torch.ones(1), "representations.drawn": torch.ones(1)}
        >>> list(take_out(state, "representations.")), list(state)
        (['drawn'], ['projector.weight'])
    """
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name) for name in names}


def logged_terms(components: LossComponents) -> dict[str, Tensor]:
    """Returns the weighted terms under the names that solo-learn's losses have.

    Examples:
        >>> import torch
        >>> terms = {"variance": torch.tensor(2.0), "representations/hog": torch.tensor(3.0)}
        >>> weights = {"variance": 0.5, "representations/hog": 1.0}
        >>> logged_terms(LossComponents(torch.tensor(4.0), terms, weights))
        {'train_variance_loss': tensor(1.), 'train_hog_loss': tensor(3.)}
    """
    terms = components.as_dict()
    return {
        f"train_{name.removeprefix('representations/')}_loss": terms[name]
        for name in components.terms
    }


class _Live(nn.Module):
    """Representations computed from the images, in the form of cached ones."""

    def __init__(self, representations: Representations) -> None:
        super().__init__()
        self.representations = representations

    def forward(self, images: Tensor, indices: Tensor) -> dict[str, Tensor]:
        representations: dict[str, Tensor] = self.representations(images)
        return representations


def with_host_normalization(
    options: Mapping[str, Any], cfg: DictConfig, view: int
) -> dict[str, Any]:
    """Returns options whose ``normalization``, if they say none, is that of solo-learn's pipeline.

    Args:
        options: Options with ``normalization``.
        cfg: solo-learn's configuration.
        view: The number of the pipeline in ``augmentations``.

    Returns:
        The options, with a normalisation as solo-learn itself builds it.
    """
    if options["normalization"] is not None:
        return dict(options)
    from solo.data.pretrain_dataloader import build_transform_pipeline

    pipeline = build_transform_pipeline(cfg.data.dataset, cfg.augmentations[view])
    (normalize,) = [t for t in pipeline.transforms if isinstance(t, transforms.Normalize)]
    normalization = Normalization(tuple(normalize.mean), tuple(normalize.std))
    return {**options, "normalization": normalization}


def representation_source(
    options: Mapping[str, Any], dataset: Any = None, *, has_images: bool = True
) -> nn.Module | None:
    """Builds what turns images and sample indexes into representations.

    Args:
        options: Filled options with ``representations``, ``cache`` and ``fill_cache``.
        dataset: The data set whose samples the indexes count; needed with a cache.
        has_images: Whether non-augmented images will be given. Without, everything in the store is
            read, and ``representations`` is not looked at.

    Returns:
        A module called with images (N, C, H, W), or None, and sample indexes (N,), which returns
        name -> tensor of shape (N, D_k); None where no representation is wanted.

    Raises:
        SoloConfigError: If the representations cannot be built, or the store is missing or does not
            belong to them and the data set.

    Examples:
        >>> import torch
        >>> from mvmr_loss.adapters.solo.options import check_method_options
        >>> options = check_method_options({"representations": ["pixels"]})
        >>> source = representation_source(options)
        >>> source(torch.rand(4, 3, 8, 8), torch.arange(4))["pixels"].shape
        torch.Size([4, 192])
    """
    specification = options["representations"]
    if specification is None:
        specification = PAPER_REPRESENTATIONS
    if not specification:
        return None
    check_cache_exists(options)
    try:
        representations = None
        if has_images:
            extraction = select(options, EXTRACTION_OPTIONS)
            if extraction["normalization"] is None:
                del extraction["normalization"]
            representations = Representations(specification, **extraction)
        if options["cache"] is not None:
            return _cached(representations, Path(options["cache"]), dataset)
    except (TypeError, ValueError) as error:
        raise SoloConfigError(f"representations: {error}") from error
    assert representations is not None
    return _Live(representations)


def _cached(representations: Representations | None, path: Path, dataset: Any) -> nn.Module:
    """Opens or creates a store of a data set's representations."""
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"cache needs a data set with a length and sample indexes but the loader's is {dataset!r}"
            "; use data.format image_folder."
        )
    settings = RepresentationCache(path).settings if (path / "metadata.json").exists() else None
    identity: dict[str, Any] = {"num_samples": len(dataset)}
    # What an existing store was not told cannot be compared; the features are, at any rate.
    if settings is None or settings.get("fingerprint") is not None:
        identity["fingerprint"] = dataset_fingerprint(dataset)
    untold = settings is not None and settings.get("normalization") is None
    if representations is not None and not untold:
        told = representations.normalization
        identity["normalization"] = (told.mean, told.std)
    return CachedRepresentations(representations, path, **identity)

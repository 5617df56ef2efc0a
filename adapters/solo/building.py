"""Building what turns a batch's images and sample indexes into representations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torchvision import transforms

from mvmr_loss import LossComponents, Normalization, Representations
from mvmr_loss.presets import PAPER_REPRESENTATIONS

from .. import check_cache  # noqa: TID252 - of the same checkout
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


def build_representations(
    options: Mapping[str, Any], dataset: Any = None, *, has_images: bool = True
) -> Representations | None:
    """Builds what turns images and sample indexes into representations.

    Args:
        options: Filled options with ``representations``, ``cache`` and ``fill_cache``.
        dataset: The data set whose samples the indexes count; needed with a cache.
        has_images: Whether non-augmented images will be given. Without, everything in the store is
            read, and ``representations`` is not looked at.

    Returns:
        The representations; None where none is wanted.

    Raises:
        SoloConfigError: If the representations cannot be built, or the store is missing or does not
            belong to them and the data set.

    Examples:
        >>> import torch
        >>> from mvmr_loss.adapters.solo.options import check_method_options
        >>> options = check_method_options({"representations": ["pixels"]})
        >>> build_representations(options)(torch.rand(4, 3, 8, 8))["pixels"].shape
        torch.Size([4, 192])
    """
    specification = options["representations"]
    if specification is None:
        specification = PAPER_REPRESENTATIONS
    if not specification:
        return None
    extraction = select(options, EXTRACTION_OPTIONS)
    if extraction["normalization"] is None:
        del extraction["normalization"]
    try:
        check_cache(options["cache"], options["fill_cache"])
        representations = Representations(specification if has_images else None, **extraction)
        if representations.cache is not None:
            if not hasattr(dataset, "__len__"):
                raise ValueError(
                    "cache needs a data set with a length and sample indexes but the loader's is "
                    f"{dataset!r}; use data.format image_folder."
                )
            representations.open_cache(dataset)
    except (TypeError, ValueError) as error:
        raise SoloConfigError(f"representations: {error}") from error
    return representations

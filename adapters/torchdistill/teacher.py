"""Teachers whose features are computed once an image: a model, its data set and its forward."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from torchdistill.core.interfaces.registry import register_forward_proc_func
from torchdistill.datasets.registry import register_dataset_wrapper
from torchdistill.models.registry import register_model

from mvmr_loss import Representations

# What a batch's supplementary dict has of a sample.
INDEX, IMAGE = "index", "non_augmented"


@register_model
class FixedRepresentations(nn.Module):
    """Frozen teachers and handcrafted representations as torchdistill's teacher model.

    Its output is a mapping, which :class:`DependenceLoss` takes at the path ``"."``. With a ``cache``
    each image's are computed once and read back later by the sample's index.

    Args:
        representations: What :class:`~mvmr_loss.Representations` takes, such as
            ``[{"name": "teacher", "source": "timm", "model": "resnet50", "weights": "default"}]``.
        normalization: How the images are normalised.
        sketch_dim: If given, wider representations are replaced by sketches of this width.
        cache: Folder of the store, or a mapping with it as ``path`` and its options, as of
            :class:`~mvmr_loss.Representations`. None: everything is computed in each step.

    Examples:
        >>> import torch
        >>> model = FixedRepresentations(["pixels"], normalization="none")
        >>> model(torch.rand(2, 3, 8, 8))["pixels"].shape
        torch.Size([2, 192])
    """

    def __init__(
        self,
        representations: Sequence[Any] | Mapping[str, Any],
        normalization: Any = "imagenet",
        sketch_dim: int | None = None,
        cache: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.representations = Representations(
            representations, normalization=normalization, sketch_dim=sketch_dim, cache=cache
        )

    def forward(self, images: Tensor, indices: Tensor | None = None) -> dict[str, Tensor]:
        """Computes or reads the representations.

        Args:
            images: The non-augmented images (N, C, H, W).
            indices: Each one's index in the data set, (N,); needed with a cache.

        Returns:
            Name -> tensor of shape (N, D_k).

        Raises:
            ValueError: If there is a cache but no index.
        """
        if self.representations.cache is not None and indices is None:
            raise ValueError(
                "indices must be given with a cache but are None; let the teacher have forward_proc: "
                "forward_non_augmented and the data loader dataset_wrapper: {key: "
                "NonAugmentedDatasetWrapper}."
            )
        features: dict[str, Tensor] = self.representations(images, indices)
        return features


@register_dataset_wrapper
class NonAugmentedDatasetWrapper(Dataset[Any]):
    """Gives each sample's index, and its image without augmentation beside the augmented one.

    Args:
        org_dataset: A data set of (image, target) with an attribute ``transform``, which augments. It
            stays as it is.
        transform: Makes the non-augmented image. None: the sample's own, which must be the same in every
            epoch where representations are cached.

    Raises:
        ValueError: If a transform is given for a data set that has none to be replaced.
    """

    def __init__(self, org_dataset: Any, transform: Callable[[Any], Any] | None = None) -> None:
        self.org_dataset, self.transform = org_dataset, transform
        self.augment = None
        if transform is not None:
            if not callable(getattr(org_dataset, "transform", None)):
                raise ValueError(
                    "transform must be None for a data set without a transform of its own, but is "
                    f"{transform!r}; torchvision's data sets have one."
                )
            self.augment = org_dataset.transform
            # A copy: the next stage of a training, or its validation, takes the same data set.
            self.org_dataset = copy.copy(org_dataset)
            self.org_dataset.transform = None
            if hasattr(org_dataset, "transforms"):
                # What some of torchvision's read instead, which has the target's transform as well.
                self.org_dataset.transforms = _without_transform(org_dataset.transforms)

    def __len__(self) -> int:
        return len(self.org_dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        image, target = self.org_dataset[index]
        supplement = {INDEX: index}
        if self.transform is not None and self.augment is not None:
            supplement[IMAGE] = self.transform(image)
            image = self.augment(image)
        return image, target, supplement


def _without_transform(transforms: Any) -> Any:
    """Returns what torchvision makes of both transforms with that of the target alone."""
    if not hasattr(transforms, "transform"):
        return None
    transforms = copy.copy(transforms)
    transforms.transform = None
    return transforms


@register_forward_proc_func  # type: ignore[untyped-decorator, unused-ignore]
def forward_non_augmented(
    model: Callable[..., Any],
    sample_batch: Tensor,
    targets: Any = None,
    supp_dict: Mapping[str, Any] | None = None,
    **_: Any,
) -> Any:
    """Calls a model with the non-augmented images and their indices; a ``forward_proc`` of torchdistill.

    Args:
        model: Such as :class:`FixedRepresentations`.
        sample_batch: The augmented images, taken where there are no others.
        targets: Not used.
        supp_dict: What :class:`NonAugmentedDatasetWrapper` gave.
        **_: Not used.

    Returns:
        The model's output.
    """
    supplement = supp_dict or {}
    images = supplement.get(IMAGE, sample_batch)
    return model(images.to(sample_batch.device), supplement.get(INDEX))

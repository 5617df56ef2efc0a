"""The views of MV-MR as a lightly transform: the non-augmented one first, then augmented ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.torchvision_v2_compatibility import torchvision_transforms as T
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL.Image import Image
from torch import Tensor

from mvmr_loss import Normalization
from mvmr_loss._checks import check_int, check_number

Statistics = Mapping[str, Sequence[float]]

CIFAR_NORMALIZE = {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.261]}


class NonAugmentedViewTransform:
    """Turns an image into the non-augmented view: resized, centre-cropped to a square, normalised.

    The representations of MV-MR are computed from this view. It draws nothing at random.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), section 3.

    Args:
        input_size: Side of the square view in pixels.
        resize_size: The image's shorter side is resized to this many pixels before the crop; None
            means ``input_size``.
        interpolation: "bilinear", "bicubic" or "nearest".
        normalize: "mean" and "std", one number a channel; None leaves values in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> view = NonAugmentedViewTransform(32, normalize=None)(torch.rand(3, 40, 60))
        >>> view.shape, view.dtype
        (torch.Size([3, 32, 32]), torch.float32)
    """

    def __init__(
        self,
        input_size: int = 224,
        resize_size: int | None = None,
        interpolation: str = "bilinear",
        normalize: Statistics | None = IMAGENET_NORMALIZE,
    ) -> None:
        resize_size = input_size if resize_size is None else resize_size
        check_int("input_size", input_size, minimum=1)
        check_int("resize_size", resize_size, minimum=input_size)
        self.normalize = _check_normalization(normalize)
        self.transform = T.Compose(
            [
                T.Resize(resize_size, interpolation=_interpolation_mode(interpolation)),
                T.CenterCrop(input_size),
                T.ToTensor(),
                *_normalization(self.normalize),
            ]
        )

    def __call__(self, image: Tensor | Image) -> Tensor:
        """Returns the view.

        Args:
            image: PIL image, or tensor of shape (C, H, W), uint8 or floating-point in [0, 1].

        Returns:
            Tensor of shape (C, input_size, input_size), float32.

        Raises:
            TypeError: If ``image`` is neither a PIL image nor a tensor.
            ValueError: If its number of channels is not that of ``normalize``.
        """
        view: Tensor = self.transform(_check_image(image, self.normalize))
        return view


class MVMRViewTransform:
    """Turns an image into one augmented view of MV-MR.

    Random resized crop, horizontal flip, colour jitter, grey, Gaussian blur, normalisation. The
    defaults are those of the authors' release for ImageNet-1K.

    Source: the authors' release of MV-MR (arXiv 2303.12130).

    Args:
        input_size: Side of the square view in pixels.
        min_scale: Smallest area of the crop, as a part of the image's.
        interpolation: "bilinear", "bicubic" or "nearest".
        hf_prob: Probability of the horizontal flip.
        cj_prob: Probability of the colour jitter.
        cj_strength: Factor of the four following strengths.
        cj_bright: Strength of the brightness jitter.
        cj_contrast: Strength of the contrast jitter.
        cj_sat: Strength of the saturation jitter.
        cj_hue: Strength of the hue jitter.
        random_gray_scale: Probability of the conversion to grey.
        gaussian_blur: Probability of the Gaussian blur.
        blur_kernel_size: Odd side of the blur's kernel in pixels; None means
            ``2 * int(0.05 * input_size) + 1``.
        sigmas: Range of the blur's standard deviation in pixels.
        normalize: "mean" and "std", one number a channel; None leaves values in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> MVMRViewTransform(32)(torch.rand(3, 40, 60)).shape
        torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        input_size: int = 224,
        min_scale: float = 0.08,
        interpolation: str = "bilinear",
        hf_prob: float = 0.5,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float = 0.8,
        cj_contrast: float = 0.8,
        cj_sat: float = 0.8,
        cj_hue: float = 0.2,
        random_gray_scale: float = 0.2,
        gaussian_blur: float = 1.0,
        blur_kernel_size: int | None = None,
        sigmas: tuple[float, float] = (0.1, 2.0),
        normalize: Statistics | None = IMAGENET_NORMALIZE,
    ) -> None:
        check_int("input_size", input_size, minimum=1)
        probabilities = {
            "hf_prob": hf_prob,
            "cj_prob": cj_prob,
            "random_gray_scale": random_gray_scale,
            "gaussian_blur": gaussian_blur,
        }
        for name, value in probabilities.items():
            check_number(name, value, minimum=0, maximum=1)
        check_number("min_scale", min_scale, above=0, maximum=1)
        if blur_kernel_size is None:
            blur_kernel_size = 2 * int(0.05 * input_size) + 1
        self.normalize = _check_normalization(normalize)
        jitter = T.ColorJitter(
            brightness=cj_strength * cj_bright,
            contrast=cj_strength * cj_contrast,
            saturation=cj_strength * cj_sat,
            hue=cj_strength * cj_hue,
        )
        blur = T.GaussianBlur(kernel_size=blur_kernel_size, sigma=tuple(sigmas))
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(
                    input_size,
                    scale=(min_scale, 1.0),
                    interpolation=_interpolation_mode(interpolation),
                ),
                T.RandomHorizontalFlip(p=hf_prob),
                T.RandomApply([jitter], p=cj_prob),
                T.RandomGrayscale(p=random_gray_scale),
                # The blur works on tensors: it would turn a PIL image into one and back.
                T.ToTensor(),
                T.RandomApply([blur], p=gaussian_blur),
                *_normalization(self.normalize),
            ]
        )

    def __call__(self, image: Tensor | Image) -> Tensor:
        """Returns an augmented view.

        Args:
            image: PIL image, or tensor of shape (C, H, W), uint8 or floating-point in [0, 1].

        Returns:
            Tensor of shape (C, input_size, input_size), float32.

        Raises:
            TypeError: If ``image`` is neither a PIL image nor a tensor.
            ValueError: If its number of channels is not that of ``normalize``.
        """
        view: Tensor = self.transform(_check_image(image, self.normalize))
        return view


class MVMRTransform(MultiViewTransform):
    """The views of MV-MR: the non-augmented one first, then one or more augmented ones.

    Works wherever lightly's transforms do: as ``transform`` of ``LightlyDataset`` and of
    torchvision's data sets, on PIL images and on tensors. :meth:`stl10`, :meth:`cifar` and
    :meth:`imagenet` give the settings of the authors' release, any of which may be overridden.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), and the authors' release.

    Args:
        input_size: Side of every view in pixels.
        resize_size: The non-augmented view's shorter side before its centre crop; None means
            ``input_size``.
        num_augmented_views: Number of augmented views, at least 1.
        interpolation: "bilinear", "bicubic" or "nearest", for all views.
        normalize: "mean" and "std", one number a channel, for all views; None leaves values in
            [0, 1].
        **augmentation: The further options of :class:`MVMRViewTransform`.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an argument is out of range.

    Examples:
        >>> views = MVMRTransform.cifar(num_augmented_views=2)(torch.rand(3, 32, 32))
        >>> [tuple(view.shape) for view in views]
        [(3, 32, 32), (3, 32, 32), (3, 32, 32)]
    """

    def __init__(
        self,
        input_size: int = 224,
        resize_size: int | None = None,
        num_augmented_views: int = 1,
        interpolation: str = "bilinear",
        normalize: Statistics | None = IMAGENET_NORMALIZE,
        **augmentation: Any,
    ) -> None:
        check_int("num_augmented_views", num_augmented_views, minimum=1)
        shared: dict[str, Any] = {"interpolation": interpolation, "normalize": normalize}
        plain = NonAugmentedViewTransform(input_size, resize_size, **shared)
        augmented = MVMRViewTransform(input_size, **shared, **augmentation)
        super().__init__(transforms=[plain, *[augmented] * num_augmented_views])

    @classmethod
    def stl10(cls, input_size: int = 96, **options: Any) -> MVMRTransform:
        """Returns the release's transform for STL10: 96 pixels, ImageNet's mean and std.

        Args:
            input_size: Side of every view in pixels.
            **options: Any further argument of :class:`MVMRTransform`, to override it.

        Returns:
            The transform.
        """
        return cls(input_size, **options)

    @classmethod
    def cifar(cls, input_size: int = 32, **options: Any) -> MVMRTransform:
        """Returns the release's transform for CIFAR: 32 pixels, half the jitter, no blur.

        Args:
            input_size: Side of every view in pixels.
            **options: Any further argument of :class:`MVMRTransform`, to override it.

        Returns:
            The transform.
        """
        preset = {
            "min_scale": 0.2,
            "interpolation": "bicubic",
            "cj_strength": 0.5,
            "random_gray_scale": 0.1,
            "gaussian_blur": 0.0,
            "normalize": CIFAR_NORMALIZE,
        }
        return cls(input_size, **{**preset, **options})

    @classmethod
    def imagenet(cls, input_size: int = 224, **options: Any) -> MVMRTransform:
        """Returns the release's transform for ImageNet: 224 pixels, cut out of 256.

        Args:
            input_size: Side of every view in pixels.
            **options: Any further argument of :class:`MVMRTransform`, to override it.

        Returns:
            The transform.
        """
        preset = {"resize_size": round(input_size * 256 / 224)}
        return cls(input_size, **{**preset, **options})


def check_normalization(dataset: Any, told: Normalization) -> None:
    """Raises if a data set's :class:`MVMRTransform` normalises otherwise than it is told.

    Args:
        dataset: A data set, perhaps a wrapper of the one with the transform.
        told: What representations undo.

    Raises:
        ValueError: If the normalisations differ.

    Examples:
        >>> from types import SimpleNamespace
        >>> check_normalization(SimpleNamespace(transform=MVMRTransform()), Normalization.imagenet())
    """
    while (transform := getattr(dataset, "transform", None)) is None and hasattr(
        dataset, "dataset"
    ):
        dataset = dataset.dataset
    if not isinstance(transform, MVMRTransform):
        return
    given = transform.transforms[0].normalize
    done = (
        Normalization.none()
        if given is None
        else Normalization(tuple(given["mean"]), tuple(given["std"]))
    )
    if done != told:
        raise ValueError(
            f"normalization must be that of the data set's MVMRTransform, mean {done.mean} and std "
            f"{done.std}, but is mean {told.mean} and std {told.std}; give "
            f"normalization={[list(done.mean), list(done.std)]}, or normalize to the transform."
        )


def check_views(views: object) -> list[Tensor]:
    """Returns the views of a batch after checking them."""
    remedy = "use MVMRTransform as the data set's transform"
    if not isinstance(views, (list, tuple)) or not all(isinstance(v, Tensor) for v in views):
        raise TypeError(
            "the batch's views must be a list of tensors but are a "
            f"{type(views).__name__}; {remedy}."
        )
    if len(views) < 2:
        raise ValueError(
            "the batch must have at least two views, the non-augmented one first, "
            f"but has {len(views)}; {remedy}."
        )
    shapes = [tuple(view.shape) for view in views]
    if any(len(shape) != 4 or shape != shapes[0] for shape in shapes):
        raise ValueError(
            "the batch's views must all have the same shape (N, C, H, W) but have shapes "
            f"{shapes}; {remedy}, which gives all views one input_size."
        )
    return list(views)


def _check_normalization(normalize: Statistics | None) -> Statistics | None:
    """Returns the normalisation after checking it."""
    if normalize is None:
        return None
    if (
        not isinstance(normalize, Mapping)
        or set(normalize) != {"mean", "std"}
        or len(normalize["mean"]) != len(normalize["std"])
        or 0 in normalize["std"]
    ):
        raise ValueError(
            "normalize must be {'mean': [...], 'std': [...]}, as many numbers in both and no std "
            f"of 0, or None, but is {normalize!r}."
        )
    return normalize


def _normalization(normalize: Statistics | None) -> list[Any]:
    """Returns the last step of a transform, if there is one."""
    return [] if normalize is None else [T.Normalize(mean=normalize["mean"], std=normalize["std"])]


def _interpolation_mode(interpolation: str) -> Any:
    """Returns torchvision's interpolation mode of a name."""
    if interpolation not in ("bilinear", "bicubic", "nearest"):
        raise ValueError(
            f"interpolation must be 'bilinear', 'bicubic' or 'nearest' but is {interpolation!r}."
        )
    return T.InterpolationMode(interpolation)


def _check_image(image: Tensor | Image, normalize: Statistics | None) -> Tensor | Image:
    """Returns the image after checking its type and number of channels."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or not (image.is_floating_point() or image.dtype == torch.uint8):
            raise ValueError(
                "image must have shape (C, H, W) and be uint8 or floating-point, but has shape "
                f"{tuple(image.shape)} and {image.dtype}; a batch is transformed image by image."
            )
        channels = len(image)
    elif isinstance(image, Image):
        channels = len(image.getbands())
    else:
        raise TypeError(
            f"image must be a PIL image or a torch.Tensor but is a {type(image).__name__}."
        )
    if normalize is not None and channels != len(normalize["mean"]):
        raise ValueError(
            f"image must have {len(normalize['mean'])} channels, as normalize has, but has "
            f"{channels}; convert it, for example with image.convert('RGB'), or give normalize "
            "the mean and std of its channels."
        )
    return image

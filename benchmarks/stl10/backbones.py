"""Backbones without classifier, by name."""

from __future__ import annotations

import inspect

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.common.encoder import SmallResNet
from benchmarks.stl10.settings import Settings
from mvmr_loss.backbones import without_head

SMALL_WIDTHS = (32, 64, 128)


def build_backbone(settings: Settings) -> nn.Module:
    """Returns the backbone without its classifier and without weights of others.

    Its state dict has the names of torchvision's or timm's model of that name, so that the model
    itself loads it.

    Args:
        settings: ``backbone``, ``stem`` and ``image_size`` are read.

    Returns:
        A module from images of shape (N, 3, H, W) to features of shape (N, D).

    Raises:
        ImportError: If the name may be one of timm's, which is not installed.
        ValueError: If the name is unknown or the model is none that gives features.

    Examples:
        >>> backbone = build_backbone(Settings(backbone="resnet18", image_size=32))
        >>> feature_dim(backbone, 32), backbone.conv1.stride
        (512, (1, 1))
    """
    name = settings.backbone
    if name == "small":
        return SmallResNet(SMALL_WIDTHS)
    if has_classifier(settings):
        return _torchvision(name, settings)
    return _timm(name, settings)


def loading_code(settings: Settings, backbone: nn.Module) -> list[str]:
    """Returns the lines of Python that build the model which loads the backbone's weights.

    Args:
        settings: ``backbone``, ``stem`` and ``image_size`` are read.
        backbone: What :func:`build_backbone` made of them.

    Returns:
        Lines that leave the model as ``model``.

    Examples:
        >>> settings = Settings(backbone="resnet18")
        >>> for line in loading_code(settings, build_backbone(settings)):
        ...     print(line)
        import torch, torchvision
        model = torchvision.models.get_model('resnet18', weights=None)
        model.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    """
    name, size = settings.backbone, settings.image_size
    if isinstance(backbone, SmallResNet):
        return [
            "import torch",
            "from benchmarks.common.encoder import SmallResNet",
            f"model = SmallResNet({SMALL_WIDTHS})",
        ]
    if has_classifier(settings):
        sized = f", image_size={size}" if name.startswith("vit_") else ""
        lines = [
            "import torch, torchvision",
            f"model = torchvision.models.get_model({name!r}, weights=None{sized})",
        ]
        if settings.stem == "small" and isinstance(backbone, torchvision.models.ResNet):
            stem = "torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)"
            lines.append(f"model.conv1 = {stem}")
        return lines
    # A transformer has been built for the size of image.
    sized = f", img_size={size}" if hasattr(backbone, "patch_embed") else ""
    return [
        "import torch, timm",
        f"model = timm.create_model({name!r}, num_classes=0{sized})",
    ]


def has_classifier(settings: Settings) -> bool:
    """Says whether the model of :func:`loading_code` has a classifier that the backbone lacks."""
    return settings.backbone in torchvision.models.list_models(module=torchvision.models)


@torch.no_grad()
def feature_dim(backbone: nn.Module, image_size: int) -> int:
    """Returns the width of a backbone's features, by a look at one.

    Args:
        backbone: From :func:`build_backbone`.
        image_size: Side of the images in pixels.

    Returns:
        The width D.

    Raises:
        ValueError: If the features are not of shape (N, D).
    """
    training = backbone.training
    features = backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone must give features of shape (N, D) but gives {got}.")
    return features.shape[1]


def _torchvision(name: str, settings: Settings) -> nn.Module:
    builder = inspect.signature(torchvision.models.get_model_builder(name))
    options = {"image_size": settings.image_size} if name.startswith("vit_") else {}
    if name.startswith(("resne", "wide_resnet")):
        # The release's residual branches start at zero.
        options["zero_init_residual"] = True
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"backbone {name!r} cannot be built for images of {settings.image_size} pixels: "
            f"{error or builder}"
        ) from error
    model, width = without_head(model)
    if width is None:
        raise ValueError(
            f"backbone must be a classification model that ends in a linear layer but {name!r} is "
            "none; choose another, for example resnet18."
        )
    if settings.stem == "small" and isinstance(model, torchvision.models.ResNet):
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _timm(name: str, settings: Settings) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"backbone {name!r} is no torchvision model, and timm, where it may be one, is not "
            "installed; install it with: pip install timm"
        ) from error
    if not timm.is_model(name):
        raise ValueError(
            f"backbone must be 'small' or the name of a torchvision or timm model but is {name!r}."
        )
    try:
        # Transformers are built for a size of image; other models do not know the option.
        model: nn.Module = timm.create_model(name, num_classes=0, img_size=settings.image_size)
    except TypeError:
        model = timm.create_model(name, num_classes=0)
    return model

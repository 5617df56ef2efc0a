"""Backbones by name: torchvision's and timm's, without weights and without classifier."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn

from mvmr_loss.backbones import without_head


def build_backbone(backbone: str | nn.Module, feature_dim: int | None) -> tuple[nn.Module, int]:
    """Returns a backbone without classifier and the width of its features.

    Args:
        backbone: The name of a torchvision or timm model, or a module, which is returned as it is.
        feature_dim: The width; None: what the backbone tells.

    Returns:
        The module and the width of its features.

    Raises:
        ImportError: If the name is none of torchvision's and timm is not installed.
        TypeError: If ``backbone`` is neither a name nor a module.
        ValueError: If the name is unknown, or the width is neither given nor known.
    """
    if isinstance(backbone, str):
        if backbone in torchvision.models.list_models():
            backbone, known = _torchvision_backbone(backbone)
        else:
            backbone, known = _timm_backbone(backbone)
    elif isinstance(backbone, nn.Module):
        known = _stated_width(backbone)
    else:
        raise TypeError(
            f"backbone must be a name or a torch.nn.Module but is a {type(backbone).__name__}."
        )
    width = known if feature_dim is None else feature_dim
    if isinstance(width, bool) or not isinstance(width, int):
        raise ValueError(
            "feature_dim must be given for a backbone that has no num_features: the width of its "
            f"features, an int, but it is {width!r}."
        )
    return backbone, width


def _torchvision_backbone(name: str) -> tuple[nn.Module, int | None]:
    """Returns a torchvision model whose last linear layer is replaced by the identity."""
    # The release's residual branches start at zero.
    options = {"zero_init_residual": True} if name.startswith(("resne", "wide_resnet")) else {}
    return without_head(torchvision.models.get_model(name, weights=None, **options))


def _timm_backbone(name: str) -> tuple[nn.Module, int | None]:
    """Returns a timm model without classifier."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"backbone {name!r} is no torchvision model, and timm, where it may be one, is not "
            "installed; install it with: pip install timm"
        ) from error
    if not timm.is_model(name):
        raise ValueError(
            "backbone must be the name of a torchvision or timm model, or a torch.nn.Module, but "
            f"is {name!r}."
        )
    # ViTs of lightly's benchmarks take images of any size, and drop paths while they train.
    vit: dict[str, Any] = {"dynamic_img_size": True, "drop_path_rate": 0.1}
    model: Any = timm.create_model(name, num_classes=0, **vit if name.startswith("vit_") else {})
    return model, _stated_width(model)


def _stated_width(module: nn.Module) -> Any:
    """Returns the width of its features that a module states as timm's do, or None."""
    # Of some of timm's, as MobileNetV3, a layer stands between what is pooled and the features.
    return getattr(module, "head_hidden_size", getattr(module, "num_features", None))

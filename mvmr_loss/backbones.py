"""Classification networks as backbones: without the layer that names the classes."""

from __future__ import annotations

from torch import nn

HEADS = ("fc", "classifier", "heads", "head")


def without_head(model: nn.Module) -> tuple[nn.Module, int | None]:
    """Takes the last linear layer of a network's classifier away, in place.

    timm's networks are asked to do it themselves; of others, such as torchvision's, the last linear
    layer in ``fc``, ``classifier``, ``heads`` or ``head`` becomes the identity.

    Args:
        model: A classification network.

    Returns:
        The network and the width of its features; None as width, and the network as it was, if no
        such layer was found.

    Examples:
        >>> model = nn.Sequential()
        >>> model.stem, model.fc = nn.Linear(3, 8), nn.Linear(8, 10)
        >>> without_head(model)[1], model.fc
        (8, Identity())
    """
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(0)
        width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
        return model, None if width is None else int(width)
    for head in HEADS:
        for path, layer in reversed(list(model.named_modules())):
            if isinstance(layer, nn.Linear) and path.split(".")[0] == head:
                parent, _, attribute = path.rpartition(".")
                setattr(model.get_submodule(parent), attribute, nn.Identity())
                return model, layer.in_features
    return model, None

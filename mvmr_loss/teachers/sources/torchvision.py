"""Teachers from torchvision."""

from __future__ import annotations

from torch import nn

from mvmr_loss.teachers.checkpoints import import_library, load_checkpoint
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing, check_interpolation, pair, size
from mvmr_loss.teachers.sources.request import Loaded, Request, keeps_head


def from_torchvision(request: Request) -> Loaded:
    """Builds a torchvision classification network."""
    models = import_library("torchvision.models", "torchvision")
    name, file = request.name("torchvision"), request.file()
    request.warn_if_random("torchvision")
    try:
        known = models.get_model_weights(name)
    except ValueError:
        raise ValueError(f"model must be a network of torchvision but is {name!r}.") from None
    try:
        chosen = known[request.weights] if request.weights and file is None else None
    except KeyError:
        raise ValueError(
            f"weights of {name} must be a file or one of {', '.join(known.__members__)} "
            f"but is {request.weights!r}."
        ) from None
    network = models.get_model(name, weights=chosen, **request.options)
    if not request.keep_head:
        linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
        if linear and keeps_head(linear[-1]):
            parent, _, attribute = linear[-1].rpartition(".")
            setattr(network.get_submodule(parent), attribute, nn.Identity())
    if file is not None:
        load_checkpoint(network, file, request.prefix)
    # Weights of one's own are taken to be trained like the library's.
    transform = (known.DEFAULT if chosen is None else chosen).transforms()
    return network, TeacherPreprocessing(
        resize=size(transform.resize_size),
        crop=pair(transform.crop_size),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=check_interpolation(transform.interpolation.value),
    )

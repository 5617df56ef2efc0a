"""Teachers from torchvision."""

from __future__ import annotations

from contextlib import nullcontext

from mvmr_loss.backbones import without_head
from mvmr_loss.teachers.checkpoints import import_library, load_checkpoint
from mvmr_loss.teachers.preprocessing import TeacherPreprocessing, check_same, pair, refusal, size
from mvmr_loss.teachers.sources.downloads import downloading
from mvmr_loss.teachers.sources.request import Loaded, Request


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
    with nullcontext() if chosen is None else downloading(f"weights {request.weights} of {name}"):
        network = models.get_model(name, weights=chosen, **request.library_options())
    if not request.keep_head:
        network, _ = without_head(network)
    if file is not None:
        load_checkpoint(network, file, request.prefix)

    def preprocessing() -> TeacherPreprocessing:
        # Weights of one's own are taken to be trained like the library's.
        transform = (known.DEFAULT if chosen is None else chosen).transforms()
        try:
            own = TeacherPreprocessing(
                resize=size("resize", transform.resize_size),
                crop=pair("crop", transform.crop_size),
                mean=tuple(transform.mean),
                std=tuple(transform.std),
                interpolation=transform.interpolation.value,
            )
        except (AttributeError, TypeError) as error:
            raise refusal(
                f"torchvision's {name}", f"its {type(transform).__name__} is unknown"
            ) from error
        return check_same(f"torchvision's {name}", own, transform)

    return network, preprocessing

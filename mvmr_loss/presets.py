"""Settings by name: the paper's, the identity term, what learned best here, and distillation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

# The debiased CKA with a Gaussian kernel on embeddings of length 1.
IDENTITY_MEASURE: dict[str, Any] = {
    "name": "debiased_cka",
    "kernel": "gaussian",
    "bandwidth": 0.5,
}
# The five that the authors' release trains with.
PAPER_REPRESENTATIONS = ("pixels", "augmented_pixels", "scattering", "hog", "local_std")


class Preset(NamedTuple):
    """What a training is built from.

    Attributes:
        loss: Options of :class:`mvmr_loss.MVMRLoss` that differ from its defaults, which are the
            paper's.
        representations: Names of the representations; none: to be said, as a teacher has to be.
        sketch_dim: Width of their sketches; None: exact.
        distillation: Options of :class:`mvmr_loss.DistillationLoss` on the backbone's features, whose
            teachers are the representations; None: these meet the embeddings alone.
    """

    loss: Mapping[str, Any]
    representations: tuple[str, ...] = PAPER_REPRESENTATIONS
    sketch_dim: int | None = None
    distillation: Mapping[str, Any] | None = None


_NO_VIEW_TERMS = {"invariance_weight": 0.0, "variance_weight": 0.0, "dependence_weight": 0.0}
_IDENTITY = {**_NO_VIEW_TERMS, "identity_weight": 1.0}
_PRESETS: dict[str, Preset] = {
    "paper": Preset({}),
    "identity": Preset(
        {**_IDENTITY, "representation_weights": 0.3, "representation_views": "both"}
    ),
    "features": Preset(
        {**_IDENTITY, "representation_weights": 0.0},
        ("scattering", "hog", "local_binary_patterns"),
        1024,
        {"dependence_weight": 0.3, "scale": "coordinate", "stacked": False},
    ),
    "distillation": Preset(
        {**_NO_VIEW_TERMS, "representation_weights": 0.0}, representations=(), distillation={}
    ),
    "distillation_paper": Preset({}, representations=()),
}


def list_presets() -> list[str]:
    """Returns the names of all presets.

    Examples:
        >>> list_presets()
        ['paper', 'identity', 'features', 'distillation', 'distillation_paper']
    """
    return list(_PRESETS)


def preset_settings(name: str) -> Preset:
    """Returns the settings of a preset.

    ``paper`` is the paper's. ``identity`` replaces the terms between two views by the identity term,
    and lets all embeddings meet the representations. ``features``, which learned best here, has the
    identity term alone on the embeddings; the backbone's features are regressed onto scattering, HOG
    and local binary patterns and depend on them.

    The other two have teachers for representations, which are to be named. ``distillation`` is the best
    known: the backbone's features are regressed onto the teachers' and depend on them, and nothing else
    is asked of them. ``distillation_paper`` is the paper's objective with the teachers as its
    representations.

    Args:
        name: One of :func:`list_presets`.

    Raises:
        ValueError: If there is no preset of that name.

    Examples:
        >>> preset_settings("features").representations
        ('scattering', 'hog', 'local_binary_patterns')
        >>> preset_settings("identity").loss["identity_weight"]
        1.0
    """
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)} but is {name!r}.")
    return copy.deepcopy(_PRESETS[name])

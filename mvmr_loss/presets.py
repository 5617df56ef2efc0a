"""Settings by name: the paper's, the identity term, and what learned best here."""

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
        representations: Names of the representations.
        sketch_dim: Width of their sketches; None: exact.
        distillation: Options of :class:`mvmr_loss.DistillationLoss` on the backbone's features, whose
            teachers are the representations; None: these meet the embeddings alone.
    """

    loss: Mapping[str, Any]
    representations: tuple[str, ...] = PAPER_REPRESENTATIONS
    sketch_dim: int | None = None
    distillation: Mapping[str, Any] | None = None


_IDENTITY = {
    "invariance_weight": 0.0,
    "variance_weight": 0.0,
    "dependence_weight": 0.0,
    "identity_weight": 1.0,
}
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
}


def list_presets() -> list[str]:
    """Returns the names of all presets.

    Examples:
        >>> list_presets()
        ['paper', 'identity', 'features']
    """
    return list(_PRESETS)


def preset_settings(name: str) -> Preset:
    """Returns the settings of a preset.

    ``paper`` is the paper's. ``identity`` replaces the terms between two views by the identity term,
    and lets all embeddings meet the representations. ``features``, which learned best here, has the
    identity term alone on the embeddings; the backbone's features are regressed onto scattering, HOG
    and local binary patterns and depend on them.

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

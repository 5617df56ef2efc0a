"""Settings of the loss by name: the paper's, and that of the identity term."""

from __future__ import annotations

from typing import Any

# The debiased CKA with a Gaussian kernel on embeddings of length 1.
IDENTITY_MEASURE: dict[str, Any] = {
    "name": "debiased_cka",
    "kernel": "gaussian",
    "bandwidth": 0.5,
}

# Preset -> options of MVMRLoss that differ from its defaults, which are the paper's.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "identity": {
        "invariance_weight": 0.0,
        "variance_weight": 0.0,
        "dependence_weight": 0.0,
        "identity_weight": 1.0,
        "representation_weights": 0.3,
        "representation_views": "both",
    },
}


def list_presets() -> list[str]:
    """Returns the names of all presets of the loss.

    Examples:
        >>> list_presets()
        ['paper', 'identity']
    """
    return list(_PRESETS)


def preset_options(name: str) -> dict[str, Any]:
    """Returns the options of :class:`mvmr_loss.MVMRLoss` that a preset sets.

    ``paper`` sets none. ``identity`` replaces the terms between two views by the identity term, and
    lets all embeddings meet the representations.

    Args:
        name: One of :func:`list_presets`.

    Returns:
        The options by name.

    Raises:
        ValueError: If there is no preset of that name.

    Examples:
        >>> preset_options("identity")["identity_weight"]
        1.0
    """
    if name not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)} but is {name!r}.")
    return dict(_PRESETS[name])

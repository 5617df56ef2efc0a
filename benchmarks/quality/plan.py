"""What is run: rows of the tables, in the order of what they tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Run

PAPER = ["pixels", "augmented_pixels", "scattering", "hog", "local_std"]
KNOWN = ["scattering", "hog"]
IDENTITY: dict[str, Any] = {"method": "mvmr", "options": {"preset": "identity"}}
ALONE: dict[str, Any] = {**IDENTITY, "representations": []}
SECOND = {"representations": KNOWN, "options": {"preset": "identity", "head": "second"}}
# The encoder's features are regressed onto the representations, each coordinate standardised; what is
# recommended has them depend on these, too.
_REGRESSED = {"preset": "identity", "representation_weights": 0.0, "regression": 1.0}
REGRESSED: dict[str, Any] = {"method": "mvmr", "representations": KNOWN, "options": _REGRESSED}
RECOMMENDED: dict[str, Any] = {**REGRESSED, "options": {**_REGRESSED, "dependence": 0.3}}

# Row -> what differs from the common settings.
MAIN: dict[str, dict[str, Any]] = {
    "recommended-crops": {**RECOMMENDED, "views": "crops"},
    "regressed-crops": {**REGRESSED, "views": "crops"},
    "vicreg-crops": {"method": "vicreg", "views": "crops"},
    "simclr-crops": {"method": "simclr", "options": {"temperature": 0.2}, "views": "crops"},
    "paper": {
        "method": "mvmr",
        "options": {"preset": "paper"},
        "representations": PAPER,
        "views": "plain",
    },
    "lejepa-crops": {"method": "lejepa", "views": "crops"},
    "barlow_twins-crops": {"method": "barlow_twins", "views": "crops"},
    "byol-crops": {"method": "byol", "views": "crops"},
    "recommended": RECOMMENDED,
    "vicreg": {"method": "vicreg"},
    "simclr": {"method": "simclr", "options": {"temperature": 0.2}},
    "barlow_twins": {"method": "barlow_twins"},
    "byol": {"method": "byol"},
    "identity-crops": {**IDENTITY, **SECOND, "views": "crops"},
}


def _identity(measure: dict[str, Any], **settings: Any) -> dict[str, Any]:
    options = {"preset": "identity", "identity_measure": measure}
    return {**ALONE, "options": options, "views": "crops", **settings}


def _gaussian(bandwidth: float) -> dict[str, Any]:
    return {"name": "debiased_cka", "kernel": "gaussian", "bandwidth": bandwidth}


ABLATION: dict[str, dict[str, Any]] = {
    "representations left out": {**ALONE, "views": "crops"},
    "bandwidth 0.35": _identity(_gaussian(0.35)),
    "bandwidth 0.7": _identity(_gaussian(0.7)),
    "distance correlation, corrected": _identity({"name": "u_distance_correlation_sqr"}),
    "distance correlation": _identity({"name": "distance_correlation"}),
    "with covariance 0.04": {
        **ALONE,
        "views": "crops",
        "options": {"preset": "identity", "covariance_weight": 0.04},
    },
    "same head": {**IDENTITY, "representations": KNOWN, "views": "crops"},
    "second head, weight 1": {
        **IDENTITY,
        "representations": KNOWN,
        "views": "crops",
        "options": {"preset": "identity", "head": "second", "representation_weights": 1.0},
    },
}

ON_TOP: dict[str, dict[str, Any]] = {
    f"{name}-regularized": {
        "method": name,
        "representations": KNOWN,
        "options": {"regularizer": weight, **({"temperature": 0.2} if name == "simclr" else {})},
    }
    for name, weight in {"vicreg": 5.0, "simclr": 0.3, "barlow_twins": 5.0, "byol": 0.3}.items()
}

TABLES = {"main": MAIN, "ablation": ABLATION, "on_top": ON_TOP}
PLANS = tuple(TABLES)
COMMON: dict[str, Any] = {
    "options": {},
    "representations": [],
    "views": "two",
    "encoder": "small",
    "split": "test",
    "per_class": None,
}


def file_name(row: str) -> str:
    """Returns a row's name as it stands in names of files."""
    return row.replace(", ", " ").replace(" ", "-")


def plan(name: str, data: str = "photographs") -> Iterator[Run]:
    """Yields the runs of a table: all rows with the first seed, then all with the next.

    Args:
        name: A key of ``TABLES``.
        data: What the images are called.
    """
    # Options are chosen on held-out training images; the main table is of the test images.
    split = "test" if name == "main" else "validation"
    lengths = (10, 30) if name == "main" else (10,)
    seeds = range(5 if name == "main" else 3)
    for epochs in lengths:
        for seed in seeds:
            for row, differs in TABLES[name].items():
                settings = {**COMMON, "data": data, "split": split, **differs, "epochs": epochs}
                yield Run(
                    f"{name}/{file_name(row)}-epochs{epochs}-seed{seed}",
                    settings,
                    seed,
                )

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
_ON_FEATURES = {"regression": 1.0, "dependence": 0.3}
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


def _changed(**options: Any) -> dict[str, Any]:
    """Returns what is recommended, with small crops, with other options."""
    return {**RECOMMENDED, "views": "crops", "options": {**RECOMMENDED["options"], **options}}


def _gaussian(bandwidth: float) -> dict[str, Any]:
    return {"name": "debiased_cka", "kernel": "gaussian", "bandwidth": bandwidth}


ABLATION: dict[str, dict[str, Any]] = {
    "recommended": _changed(),
    "without dependence": _changed(dependence=0.0),
    "without regression": _changed(regression=0.0),
    "without either": {**ALONE, "views": "crops"},
    "without the identity term": _changed(identity_weight=0.0),
    "scattering alone": {**_changed(), "representations": ["scattering"]},
    "HOG alone": {**_changed(), "representations": ["hog"]},
    "pixels and local_std as well": {
        **_changed(),
        "representations": [*KNOWN, "pixels", "local_std"],
    },
    "dependence 1": _changed(dependence=1.0),
    "regression 0.3": _changed(regression=0.3),
    "bandwidth 0.35": _changed(identity_measure=_gaussian(0.35)),
    "bandwidth 0.7": _changed(identity_measure=_gaussian(0.7)),
    "identity by distance correlation": _changed(
        identity_measure={"name": "u_distance_correlation_sqr"}
    ),
    "with covariance 0.04": _changed(covariance_weight=0.04),
    "the paper's terms between views": {
        **_changed(),
        "options": {"preset": "paper", "representation_weights": 0.0, **_ON_FEATURES},
    },
    "two full crops": RECOMMENDED,
    # As it was recommended before features met the representations.
    "representations on a second head": {**IDENTITY, **SECOND, "views": "crops"},
}

# Each method with nothing added, and with the terms on the features that are recommended.
ON_TOP: dict[str, dict[str, Any]] = {}
for _name in ("vicreg", "simclr", "barlow_twins", "byol"):
    _own = {"temperature": 0.2} if _name == "simclr" else {}
    ON_TOP[_name] = {"method": _name, "options": _own}
    ON_TOP[f"{_name} and features"] = {
        "method": _name,
        "representations": KNOWN,
        "options": {**_own, **_ON_FEATURES},
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

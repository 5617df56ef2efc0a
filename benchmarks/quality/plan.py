"""What is run: each method's options are chosen on held-out images, then come the tables.

The rows stand in the order of what they tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Run, place_of_best

Settings = dict[str, Any]
PAPER = ["pixels", "augmented_pixels", "scattering", "hog", "local_std"]
KNOWN = ["scattering", "hog"]
LBP = "local_binary_patterns"
_IDENTITY: Settings = {"preset": "identity"}
# The encoder's features are regressed onto the representations, each coordinate standardised; what is
# recommended has them depend on these, too.
_REGRESSED: Settings = {"preset": "identity", "representation_weights": 0.0, "regression": 1.0}
ON_FEATURES: Settings = {"regression": 1.0, "dependence": 0.3}
_RECOMMENDED: Settings = {**_REGRESSED, "dependence": 0.3}
_PAPER: Settings = {"preset": "paper"}

# Method -> what it is, and three sets of what it can be.
METHODS: dict[str, tuple[Settings, tuple[Settings, ...]]] = {
    "recommended": (
        {"method": "mvmr"},
        (
            {"representations": KNOWN, "options": _RECOMMENDED},
            {"representations": [*KNOWN, LBP], "options": _RECOMMENDED},
            {
                "representations": [*KNOWN, LBP],
                "options": {**_RECOMMENDED, "regression": 2.0, "dependence": 0.6},
            },
        ),
    ),
    "simclr": (
        {"method": "simclr"},
        tuple({"options": {"temperature": value}} for value in (0.1, 0.2, 0.5)),
    ),
    "vicreg": (
        {"method": "vicreg"},
        ({}, {"options": {"nu_param": 5.0}}, {"options": {"lambda_param": 10.0}}),
    ),
    "barlow_twins": (
        {"method": "barlow_twins"},
        tuple({"options": {"lambda_param": value}} for value in (0.005, 0.02, 0.05)),
    ),
    "byol": (
        {"method": "byol"},
        tuple({"options": {"momentum": value}} for value in (0.99, 0.97, 0.9)),
    ),
    "lejepa": (
        {"method": "lejepa"},
        tuple({"options": {"lambda_param": value}} for value in (0.05, 0.02, 0.15)),
    ),
    "paper": (
        {"method": "mvmr", "representations": PAPER, "views": "plain"},
        (
            {"options": _PAPER},
            {"options": {**_PAPER, "representation_weights": 0.3}},
            {"options": {**_PAPER, "representation_views": "both"}},
        ),
    ),
}
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
BATCH_SIZE = 256
COMMON: Settings = {
    "options": {},
    "representations": [],
    "views": "two",
    "encoder": "small",
    "split": "test",
    "per_class": None,
    "learning_rate": 1e-3,
    "looks": 1,
    "bf16": False,
}
_CROPS: Settings = {"views": "crops"}

# Row -> its method, and what else differs from the common settings.
MAIN: dict[str, tuple[str, Settings]] = {
    **{f"{m}-crops": (m, _CROPS) for m in ("recommended", "simclr", "vicreg")},
    **{m: (m, {}) for m in ("recommended", "simclr", "vicreg", "barlow_twins", "byol", "paper")},
    **{f"{m}-crops": (m, _CROPS) for m in ("barlow_twins", "byol", "lejepa")},
}
_LONG = ("recommended-crops", "simclr-crops", "vicreg", "barlow_twins-crops", "byol-crops")
LITTLE: dict[str, tuple[str, Settings]] = {
    f"{row}, {count} images a class": (MAIN[row][0], {**MAIN[row][1], "per_class": count})
    for count in (100, 300)
    for row in ("recommended-crops", "simclr-crops", "vicreg")
}


def _gaussian(bandwidth: float) -> Settings:
    return {"name": "debiased_cka", "kernel": "gaussian", "bandwidth": bandwidth}


# Row -> options beside those recommended; other settings, "also" more representations.
_CHANGES: dict[str, tuple[Settings, Settings]] = {
    "recommended": ({}, {}),
    "without dependence": ({"dependence": 0.0}, {}),
    "without regression": ({"regression": 0.0}, {}),
    "without either": ({"dependence": 0.0, "regression": 0.0}, {"representations": []}),
    "without the identity term": ({"identity_weight": 0.0}, {}),
    "scattering alone": ({}, {"representations": ["scattering"]}),
    "HOG alone": ({}, {"representations": ["hog"]}),
    "pixels as well": ({}, {"also": ["pixels"]}),
    "local_std as well": ({}, {"also": ["local_std"]}),
    "dct as well": ({}, {"also": ["dct"]}),
    "colour histogram as well": ({}, {"also": ["color_histogram"]}),
    "Gabor energies as well": ({}, {"also": ["gabor"]}),
    "scattering and HOG": ({}, {"representations": KNOWN}),
    "random network as well": ({}, {"also": ["random_network"]}),
    "dependence 1": ({"dependence": 1.0}, {}),
    "regression 0.3": ({"regression": 0.3}, {}),
    "bandwidth 0.35": ({"identity_measure": _gaussian(0.35)}, {}),
    "bandwidth 0.7": ({"identity_measure": _gaussian(0.7)}, {}),
    "identity by distance correlation": (
        {"identity_measure": {"name": "u_distance_correlation_sqr"}},
        {},
    ),
    **{
        f"inverse multiquadric {width}": (
            {"identity_measure": {"name": "multiquadric_cka", "bandwidth": width}},
            {},
        )
        for width in (0.25, 0.5)
    },
    "with covariance 0.04": ({"covariance_weight": 0.04}, {}),
    "two full crops": ({}, {"views": "two"}),
    "the paper's terms between views": (
        {},
        {"options": {"preset": "paper", "representation_weights": 0.0, **ON_FEATURES}},
    ),
    **{
        f"identity-aware label {share}": (
            {},
            {"method": "identity_aware", "options": {"share": share, **ON_FEATURES}},
        )
        for share in (0.25, 0.5)
    },
    # As it was recommended before features met the representations.
    "representations on a second head": ({}, {"options": {**_IDENTITY, "head": "second"}}),
}
# What the objective is measured with, and how large: as above.
_SHAPES: dict[str, tuple[Settings, Settings]] = {
    "recommended": ({}, {}),
    **{
        f"exponent {exponent} on the features": (
            {"measure": {"name": "distance_correlation", "exponent": exponent}},
            {},
        )
        for exponent in (0.5, 1.5)
    },
    **{
        f"identity by distance correlation, exponent {exponent}": (
            {"identity_measure": {"name": "u_distance_correlation_sqr", "exponent": exponent}},
            {},
        )
        for exponent in (0.5, 1.0)
    },
    "sign of the release": ({"dependence": -0.3}, {}),
    **{
        f"batch {batch}, projector {width}": ({"width": width}, {"batch_size": batch})
        for batch in (64, 256, 1024)
        for width in (128, 512, 2048)
        if (batch, width) != (256, 512)  # as recommended
    },
}
ON_TOP = ("vicreg", "simclr", "barlow_twins", "byol")
# How much of the preset's terms stands beside another method's loss, which may be ten times as large.
ON_TOP_FACTORS = (1.0, 3.0, 10.0, 30.0)
# What makes these terms cost less; the one that was best on held-out images is tested.
LEANER: dict[str, Settings] = {
    "HOG alone": {"representations": ["hog"]},
    "heads of 256": {"options": {"hidden_dim": 256}},
}
LEAN = "heads of 256"
# A plan -> lengths in epochs, and number of seeds.
PLANS: dict[str, tuple[tuple[int, ...], int]] = {
    "selection": ((10,), 1),
    "on_top_selection": ((10,), 1),
    "on_top_leaner": ((10,), 1),
    "main": ((10, 30), 5),
    "ablation": ((10,), 3),
    "shapes": ((10,), 3),
    "on_top": ((10,), 5),
    "long": ((100,), 3),
    "little": ((30,), 3),
    "photographs": ((30,), 3),
    "resnet18": ((30, 200), 3),
    "vit": ((10,), 3),
}


def tries(method: str) -> list[Settings]:
    """Returns what is tried of a method: each set with three learning rates."""
    common, sets = METHODS[method]
    return [
        {**COMMON, **_CROPS, **common, **own, "learning_rate": rate}
        for own in sets
        for rate in LEARNING_RATES
    ]


def chosen(method: str, results: Path) -> Settings:
    """Returns what was best in linear accuracy on the held-out training images.

    Waits for another process that is at it.

    Args:
        method: A key of :data:`METHODS`.
        results: Folder of the results.

    Raises:
        FileNotFoundError: If a result is missing that nobody is making.
    """
    return _best(tries(method), results / "selection", method)


def tries_on_top(method: str, results: Path) -> list[Settings]:
    """Returns what is tried of the terms on the features beside a method as it was chosen.

    Args:
        method: One of :data:`ON_TOP`.
        results: Folder of the results.
    """
    own = {**chosen(method, results), "views": "two"}
    met = chosen("recommended", results)["representations"]
    weights = [
        {name: round(factor * weight, 1) for name, weight in ON_FEATURES.items()}
        for factor in ON_TOP_FACTORS
    ]
    return [{**own, "options": {**own["options"], **w}, "representations": met} for w in weights]


def chosen_on_top(method: str, results: Path) -> Settings:
    """Returns the best of :func:`tries_on_top`; arguments and errors as of :func:`chosen`."""
    return _best(tries_on_top(method, results), results / "on_top_selection", method)


def leaner_on_top(method: str, label: str, results: Path) -> Settings:
    """Returns :func:`chosen_on_top`, made to cost less by a key of :data:`LEANER`."""
    own, leaner = chosen_on_top(method, results), LEANER[label]
    return {**own, **leaner, "options": {**own["options"], **leaner.get("options", {})}}


def _best(tried: list[Settings], folder: Path, method: str) -> Settings:
    paths = [folder / f"{method}-{i}.json" for i in range(len(tried))]
    return tried[place_of_best(paths, "linear")]


def rows(name: str, results: Path) -> Iterator[tuple[str, Settings]]:
    """Yields the rows of a table and their settings, beside epochs and data.

    Args:
        name: A key of :data:`PLANS` but the selections.
        results: Folder of the results, where the options are read from.
    """
    if name in ("ablation", "shapes"):
        base = {**chosen("recommended", results), "split": "validation"}
        for row, (options, settings) in (_CHANGES if name == "ablation" else _SHAPES).items():
            changed = {**base, "options": {**base["options"], **options}, **settings}
            # Adam's rate goes with the root of the batch.
            changed["learning_rate"] *= (changed.get("batch_size", BATCH_SIZE) / BATCH_SIZE) ** 0.5
            also = [name for name in changed.pop("also", ()) if name not in base["representations"]]
            yield row, {**changed, "representations": [*changed["representations"], *also]}
    elif name == "on_top":
        for method in ON_TOP:
            yield method, {**chosen(method, results), "views": "two", "split": "test"}
            yield f"{method} and features", {**chosen_on_top(method, results), "split": "test"}
            yield f"{method} and {LEAN}", {**leaner_on_top(method, LEAN, results), "split": "test"}
    elif name == "on_top_leaner":
        for method in ON_TOP:
            for label in LEANER:
                leaner = leaner_on_top(method, label, results)
                yield f"{method} and {label}", {**leaner, "split": "validation"}
    else:
        table: Mapping[str, tuple[str, Settings]] = LITTLE if name == "little" else MAIN
        if name in ("long", "resnet18", "vit"):
            table = {row: MAIN[row] for row in _LONG}
        for row, (method, settings) in table.items():
            views = METHODS[method][0].get("views", COMMON["views"])
            own = {**chosen(method, results), "views": views, **settings}
            own |= {"looks": 5 if name in ("main", "long") else 1}
            own |= {"encoder": name if name in ("resnet18", "vit") else "small"}
            if name in ("resnet18", "vit"):  # Not chosen for them, and the same for all.
                own |= {"learning_rate": 2e-3}
            yield row, {**own, "split": "test"}


def file_name(row: str) -> str:
    """Returns a row's name as it stands in names of files."""
    return row.replace(", ", " ").replace(" ", "-")


def plan(name: str, data: str, results: Path) -> Iterator[Run]:
    """Yields the runs of a plan: all rows with the first seed, then all with the next.

    Args:
        name: A key of :data:`PLANS`.
        data: What the images are called.
        results: Folder of the results.
    """
    if name in ("selection", "on_top_selection"):
        first = name == "selection"
        for i in range(len(tries("recommended")) if first else len(ON_TOP_FACTORS)):
            for method in METHODS if first else ON_TOP:
                tried = tries(method)[i] if first else tries_on_top(method, results)[i]
                told = {**tried, "split": "validation", "data": data, "epochs": 10}
                yield Run(f"{name}/{method}-{i}", told, 0)
        return
    lengths, seeds = PLANS[name]
    data = "photographs" if name == "photographs" else data
    for epochs in lengths:
        for seed in range(seeds):
            for row, settings in rows(name, results):
                # So that there are about as many steps.
                more = 1000 // settings["per_class"] if settings["per_class"] else 1
                yield Run(
                    f"{name}/{file_name(row)}-epochs{epochs}-seed{seed}",
                    {**settings, "data": data, "epochs": epochs * more},
                    seed,
                )

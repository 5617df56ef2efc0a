"""Settings and options of wrong types: an error in words that names the file or the option."""

from __future__ import annotations

import datetime

import pytest

from benchmarks.stl10.train import SETTINGS, read_settings
from mvmr_loss import MVMRLoss, Representations

WRONG = [
    *(None, True, -1, 0, 2**70, 10**2000, 1.5, float("nan"), float("inf"), "x", "", b"x", []),
    *({}, [[]], {"a": 1}, [None], [{}], datetime.date(2020, 1, 1), "é\x00", (1, 2), {1: 2}),
]
RUNS = {
    "nested": "[" * 100_000,
    "an object": "epochs: !!python/object/apply:os.system ['true']",
    "another setting": "epoch: 3",
    "a list": "- epochs",
    "empty": "",
    "two documents": "a: 1\n---\nb: 2",
    "a type": "epochs: x",
    "control characters": "\x00",
}


@pytest.mark.parametrize("content", RUNS.values(), ids=RUNS)
def test_settings_of_a_run(content, tmp_path):
    (tmp_path / SETTINGS).write_text(content)
    with pytest.raises(ValueError, match="must be"):
        read_settings(tmp_path)


def cached(**options):
    return Representations(["hog"], cache={"path": "folder", **options})


SPECIFICATIONS = {
    "specification": (lambda value: Representations(value), []),
    "representation": (lambda value: Representations([value]), []),
    "options": (lambda value: Representations({"hog": value}), [None, {}]),
    "sketch_dim": (
        lambda value: Representations(["hog"], sketch_dim=value),
        [None, 2**70, 10**2000],
    ),
    "sketch_seed": (lambda value: Representations(["hog"], sketch_seed=value), [0]),
    "sketch_seed beside sketch_dim": (
        lambda value: Representations(["hog"], sketch_dim=8, sketch_seed=value),
        [0],
    ),
    "normalization": (lambda value: Representations(["hog"], normalization=value), []),
    "cache": (lambda value: Representations(["hog"], cache=value), [None, "x"]),
    "path of cache": (lambda value: cached(path=value), ["x"]),
    "num_samples of cache": (lambda value: cached(num_samples=value), [None, 2**70, 10**2000]),
    "fingerprint of cache": (lambda value: cached(fingerprint=value), [None, "x", "", "é\x00"]),
    "image_shape of cache": (lambda value: cached(num_samples=3, image_shape=value), [None]),
    "dtype of cache": (lambda value: cached(dtype=value), [None]),
    "checks_per_epoch of cache": (
        lambda value: cached(checks_per_epoch=value),
        [0, 2**70, 10**2000],
    ),
    "measure": (lambda value: MVMRLoss(dependence_measure=value), []),
    "name of measure": (lambda value: MVMRLoss(dependence_measure={"name": value}), []),
    "views": (lambda value: MVMRLoss(representation_views=value), []),
    "weight": (lambda value: MVMRLoss(dependence_weight=value), [-1, 0, 2**70, 1.5]),
    "weights": (lambda value: MVMRLoss(representation_weights={"a": value}), [-1, 0, 2**70, 1.5]),
    "eps": (lambda value: MVMRLoss(eps=value), [0, 2**70, 1.5]),
    "gather": (lambda value: MVMRLoss(gather_distributed=value), [True]),
}


@pytest.mark.parametrize("what", SPECIFICATIONS)
def test_specifications_of_wrong_types(what, tmp_path, monkeypatch):
    """What a configuration file may give the loss and representations: an error in words."""
    monkeypatch.chdir(tmp_path)
    give, right = SPECIFICATIONS[what]
    accepted = []
    for value in WRONG:
        try:
            give(value)
            accepted.append(value)
        except (TypeError, ValueError) as error:  # noqa: PERF203
            assert len(str(error)) > 20, error  # noqa: PT017
    assert list(map(repr, accepted)) == list(map(repr, right))

"""YAML of wrong types, too deep, or that explodes: an error in words that names the setting or file."""

from __future__ import annotations

import datetime
import random
import time
from dataclasses import fields

import pytest
import yaml

from benchmarks.stl10.__main__ import parser
from benchmarks.stl10.settings import PRESETS, Settings, read_file
from mvmr_loss import MVMRLoss, Representations

WRONG = [
    *(None, True, -1, 0, 2**70, 10**2000, 1.5, float("nan"), float("inf"), "x", "", b"x", []),
    *({}, [[]], {"a": 1}, [None], [{}], datetime.date(2020, 1, 1), "é\x00", (1, 2), {1: 2}),
]
EXPLODES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_of_wrong_types(name, tmp_path, capsys):
    """In a file: what is refused names the setting, and nothing raises anything but a refusal."""
    path, refused = tmp_path / "settings.yaml", 0
    for value in (None, True, -1, 1.5, float("nan"), "x", [], {}, [[]], {"a": 1}, [None]):
        path.write_text(yaml.safe_dump({name: value}))
        try:
            parser().parse_args(["run", f"--config={path}"])
        except (SystemExit, ValueError) as error:
            refused += 1
            assert name in str(error) + capsys.readouterr().err, (value, error)  # noqa: PT017
    assert refused >= 3


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (EXPLODES, "aliases are not read"),
        ("epochs: &e 3\nbatch_size: *e", "aliases are not read"),
        ("representations: &r [*r]", "aliases are not read"),
        ("[" * 100_000, "nested too deeply"),
        ("{" * 100_000, "nested too deeply"),
        ("epochs: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("epochs: !!binary 'x'", "must be YAML"),
        ("epochs: 2020-99-99", "must be YAML"),
        ("? [1, 2]\n: 3", "unhashable|unknown setting"),
        ("- epochs", "must hold settings as 'name: value'"),
        ("epoch: 3", "unknown setting 'epoch'"),
        ("1: 3", "unknown setting 1"),
        ("", "must hold settings"),
        ("---\na: 1\n---\nb: 2", "must be YAML"),
        ("\x00", "must be YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_files(content, match, tmp_path):
    path, start = tmp_path / "settings.yaml", time.monotonic()
    path.write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        read_file(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 2000
    assert time.monotonic() - start < 20


def test_file_of_another_encoding(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes("epochs: 3".encode("utf-16") + b"\xff")
    with pytest.raises(ValueError, match=r"settings\.yaml must be YAML but cannot be read"):
        read_file(path)


def test_drawn_damage_of_presets(tmp_path):
    """Presets with characters exchanged or cut out: settings, or an error in words."""
    draw, path = random.Random(0), tmp_path / "settings.yaml"
    texts, counts = [p.read_text() for p in PRESETS.glob("*.yaml")], {"read": 0, "refused": 0}
    for _ in range(300):
        text = list(draw.choice(texts))
        for _ in range(draw.choice([1, 3, 10])):
            place = draw.randrange(len(text))
            text[place : place + draw.choice([1, 1, 5])] = draw.choice(
                ["", *"[]{}:*&!|>%@`\t\n\"'#x0-"]
            )
        path.write_text("".join(text))
        try:
            read_file(path)
            counts["read"] += 1
        except (TypeError, ValueError):
            counts["refused"] += 1
    assert min(counts.values()) > 10, counts


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
    "normalization": (lambda value: Representations(["hog"], normalization=value), [None]),
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
    "eps": (lambda value: MVMRLoss(eps=value), [2**70, 1.5]),
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


def test_presets_are_read():
    for path in PRESETS.glob("*.yaml"):
        said, read = yaml.safe_load(path.read_text()), read_file(path).as_dict()
        assert {name: read[name] for name in said} == said

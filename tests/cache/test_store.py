from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mvmr_loss.cache import (
    RepresentationCache,
    metadata,
)
from tests.cache.helpers import (
    features,
)


def test_smoke_write_and_read(tmp_path):
    store = RepresentationCache.create(tmp_path / "s", {"a": 5, "b": 2}, 50)
    b = torch.randn(3, 2)
    store.write(torch.tensor([4, 40, 2]), {**features([4, 40, 2]), "b": b})
    rows = store.read([2, 4, 2, 40])
    assert torch.equal(rows["a"], features([2, 4, 2, 40])["a"])
    assert torch.equal(rows["b"], b[[2, 0, 2, 1]].half().float())
    assert list(store.read([2], ["b"])) == ["b"]
    assert store.is_valid().nonzero().flatten().tolist() == [2, 4, 40]
    assert store.is_valid([0, 4]).tolist() == [False, True]
    assert store.verify() == []
    again = RepresentationCache(tmp_path / "s")
    assert torch.equal(again.read([40])["a"], features([40])["a"])
    assert again.widths == {"a": 5, "b": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(tmp_path, dtype):
    store = RepresentationCache.create(tmp_path, {"a": 7}, 4, dtype=dtype)
    x = torch.randn(4, 7)
    store.write(range(4), {"a": x})
    assert store.read(range(4))["a"].dtype == torch.float32
    assert torch.equal(store.read(range(4))["a"], x.to(dtype).float())
    assert (tmp_path / "rows.bin").stat().st_size == 5 * 7 * dtype.itemsize


def test_rows_that_are_there_stay(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 4)
    store.write([1], features([1]))
    store.write([1, 2], {"a": torch.zeros(2, 5)})
    assert torch.equal(store.read([1])["a"], features([1])["a"])
    assert torch.equal(store.read([2])["a"], torch.zeros(1, 5))


def test_created_twice_is_opened(tmp_path):
    arguments = tmp_path, {"a": 5}, 4
    RepresentationCache.create(*arguments, settings={"x": (1, 2)}).write([1], features([1]))
    store = RepresentationCache.create(*arguments, settings={"x": [1, 2]})
    assert store.is_valid().tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"widths": {"a": 6}}, r"widths.a is 5 there but 6 here"),
        ({"widths": {"b": 5}}, r"widths is \['a'\] there but \['b'\] here"),
        ({"num_samples": 5}, "num_samples is 4 there but 5 here"),
        ({"dtype": torch.float32}, "dtype is float16 there but float32 here"),
        ({"settings": {"seed": 1}}, "settings.seed is 0 there but 1 here"),
    ],
)
def test_exception_other_settings(tmp_path, change, match):
    arguments = {"widths": {"a": 5}, "num_samples": 4, "settings": {"seed": 0}}
    RepresentationCache.create(tmp_path, **arguments)
    with pytest.raises(ValueError, match=match):
        RepresentationCache.create(tmp_path, **{**arguments, **change})


def test_exception_arguments(tmp_path):
    store = RepresentationCache.create(tmp_path / "s", {"a": 5}, 4)
    store.write([1], features([1]))
    with pytest.raises(ValueError, match=r"from 0 to 3.*reach from 1 to 4"):
        store.read([1, 4])
    with pytest.raises(ValueError, match="reach from -1"):
        store.read([-1])
    with pytest.raises(ValueError, match="must not be empty"):
        store.read([])
    with pytest.raises(TypeError, match=r"dtype torch\.float32"):
        store.read(torch.tensor([1.0]))
    with pytest.raises(TypeError, match="must be integers"):
        store.read([1.0])
    with pytest.raises(ValueError, match=r"2 of 3 are missing, the first of them 0"):
        store.read([0, 1, 2])
    with pytest.raises(ValueError, match="names must be among"):
        store.read([1], ["b"])
    with pytest.raises(ValueError, match=r"shape \(1, 5\) but has shape \(2, 5\)"):
        store.write([0], features([0, 1]))
    with pytest.raises(ValueError, match=r"of \['a'\].*of \['b'\]"):
        store.write([0], {"b": torch.zeros(1, 5)})
    with pytest.raises(ValueError, match=r"finite in torch.float16.*reach 1e\+06.*float32"):
        store.write([0], {"a": torch.full((1, 5), 1e6)})
    with pytest.raises(ValueError, match="finite"):
        store.write([0], {"a": torch.full((1, 5), torch.nan)})
    assert not store.is_valid([0])
    for widths, num_samples, dtype in (
        ({}, 4, torch.float16),
        ({"a": 0}, 4, torch.float16),
        ({"a": 1}, 0, torch.float16),
        ({"a": 1}, 4, torch.int8),
    ):
        with pytest.raises(ValueError, match=r"widths.* must|num_samples must|dtype must"):
            RepresentationCache.create(tmp_path / "n", widths, num_samples, dtype=dtype)
    with pytest.raises(FileNotFoundError, match="there is no store at"):
        RepresentationCache(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"widths": ["a"]}, TypeError, "widths must be a mapping from names .* but is a list"),
        ({"widths": {1: 2}}, TypeError, "widths must have names that are strings but has 1"),
        ({"widths": {"a": 2.0}}, TypeError, r"widths\['a'\] must be an int but is a float"),
        ({"settings": [1]}, TypeError, "settings must be a mapping but is a list"),
        (
            {"settings": {"p": Path("p")}},
            TypeError,
            "settings must be what JSON can write.* PosixPath",
        ),
        ({"settings": {(1,): 2}}, TypeError, "settings must be what JSON can write.* tuple"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of float16, .* but is float64"),
        ({"dtype": None}, ValueError, "dtype must be one of float16, .* but is None"),
    ],
)
def test_exception_what_is_stored(tmp_path, options, error, match):
    arguments = {"widths": {"a": 5}, "num_samples": 4}
    with pytest.raises(error, match=f"^{match}"):
        RepresentationCache.create(tmp_path / "s", **{**arguments, **options})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types_by_name_and_settings_without_a_number(tmp_path, dtype):
    for given in (dtype, getattr(torch, dtype)):
        settings = {"most": float("nan"), "least": float("-inf")}
        store = RepresentationCache.create(tmp_path, {"a": 5}, 4, dtype=given, settings=settings)
        assert store.dtype == getattr(torch, dtype)
    with pytest.raises(ValueError, match="settings.most is nan there but 1 here"):
        RepresentationCache.create(
            tmp_path, {"a": 5}, 4, dtype=dtype, settings={**settings, "most": 1}
        )


def test_exception_folder_with_other_files(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds 'photo\.jpg'"):
        RepresentationCache.create(tmp_path, {"a": 5}, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]


def test_pickle_copy_and_loader_workers(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    store.write(range(6), features(range(6)))
    for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store)):
        assert torch.equal(other.read([3])["a"], features([3])["a"])

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return store.read([i])["a"][0]

    batch = next(iter(DataLoader(Rows(), 6, num_workers=2)))
    assert torch.equal(batch, features(range(6))["a"])


def test_numpy_numbers(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": np.int64(5)}, np.int64(6))
    store.write(np.arange(6), features(range(6)))
    for indices in (np.array([2, 4]), np.array([2, 4], np.uint8), [np.int32(2), 4], (2, 4)):
        assert torch.equal(store.read(indices)["a"], features([2, 4])["a"])
    with pytest.raises(TypeError, match="indices must be integers"):
        store.read(np.array([2.0]))
    with pytest.raises(TypeError, match="indices must be integers"):
        store.read(np.array([True]))


def test_relative_path_in_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = RepresentationCache.create("s", {"a": 5}, 6)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    store.write([1], features([1]))
    assert store.verify(repair=True) == []
    assert torch.equal(pickle.loads(pickle.dumps(store)).read([1])["a"], features([1])["a"])


def test_the_smallest_store(tmp_path):
    RepresentationCache.create(tmp_path, {"a": 1}, 1).write([0], features([0], width=1))
    store = RepresentationCache(tmp_path)
    assert torch.equal(store.read([0])["a"], features([0], width=1)["a"])
    assert store.is_valid().tolist() == [True]


def test_the_order_of_the_columns_is_the_stores(tmp_path):
    settings = {"x": 1, "y": 2}
    RepresentationCache.create(tmp_path, {"a": 5, "b": 5}, 4, settings=settings)
    with pytest.raises(ValueError, match=r"widths is \['a', 'b'\] there but \['b', 'a'\] here"):
        RepresentationCache.create(tmp_path, {"b": 5, "a": 5}, 4, settings=settings)
    # That of the settings plays no part.
    RepresentationCache.create(tmp_path, {"a": 5, "b": 5}, 4, settings={"y": 2, "x": 1})


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"x": 1}, {"x": 1}, None),
        ({"x": 1}, {"y": 1}, ("content", ["x"], ["y"])),
        ({"x": {"y": 1}}, {"x": {"y": 1, "z": 2}}, ("x", ["y"], ["y", "z"])),
        ({"x": {"y": 1, "z": 3}}, {"x": {"y": 1, "z": [3]}}, ("x.z", 3, [3])),
        ({"x": {"y": 1}}, {"x": 1}, ("x", {"y": 1}, 1)),
    ],
)
def test_the_first_difference(a, b, expected):
    assert metadata.difference(a, b) == expected


def test_metadata_can_be_read(tmp_path):
    """By a person, and by later versions, which know the format by its number."""
    RepresentationCache.create(tmp_path, {"a": 5}, 4, settings={"name": "ä"})
    text = (tmp_path / "metadata.json").read_bytes().decode("ascii")
    assert '\n  "format": 1,\n' in text
    assert '\n    "a": 5\n' in text
    assert json.loads(text)["settings"] == {"name": "ä"}
    assert RepresentationCache(tmp_path).settings == {"name": "ä"}


def test_rows_go_to_a_device(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5, "b": 2}, 6)
    store.write([1], {**features([1]), "b": torch.zeros(1, 2)})
    for device in ("meta", torch.device("meta")):
        rows = store.read([1, 1], device=device)
        assert {name: (row.device.type, *row.shape) for name, row in rows.items()} == {
            "a": ("meta", 2, 5),
            "b": ("meta", 2, 2),
        }
        assert rows["a"].dtype == torch.float32
    for device in (None, "cpu", torch.device("cpu")):
        assert torch.equal(store.read([1], device=device)["a"], features([1])["a"])


@pytest.mark.parametrize(
    ("num_samples", "said"),
    [
        (3, [(4, 4)]),
        (1023, [(1024, 1024)]),
        (1024, [(1024, 1025), (1025, 1025)]),
        (2500, [(1024, 2501), (2048, 2501), (2501, 2501)]),
    ],
)
def test_verify_tells_how_far_it_is(tmp_path, num_samples, said):
    store = RepresentationCache.create(tmp_path, {"a": 5}, num_samples)
    store.write([0, num_samples - 1], features([0, num_samples - 1]))
    store.test_row(features([7]))
    seen = []
    assert store.verify(progress=lambda *numbers: seen.append(numbers)) == []
    assert seen == said
    (tmp_path / "rows.bin").write_bytes(bytes(10 * (num_samples + 1)))
    assert store.verify() == [*dict.fromkeys([0, num_samples - 1]), num_samples]


def test_exception_indices_are_named(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 4)
    match = r"integers of shape \(N,\): indices must be an int but is a float"
    with pytest.raises(TypeError, match=match):
        store.read([1.0])
    with pytest.raises(ValueError, match=r"must have shape \(N,\) but have \(1, 1\)"):
        store.read(torch.tensor([[1]]))
    for wrong in (torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(TypeError, match="must be integers but have dtype"):
            store.read(wrong)


def test_features_that_ask_for_a_gradient_are_stored(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 4)
    store.write([1], {"a": features([1])["a"].requires_grad_()})
    assert torch.equal(store.read([1])["a"], features([1])["a"])
    with pytest.raises(ValueError, match=r"must be finite in torch\.float16.* but reach 1e\+06"):
        store.write([2], {"a": torch.full((1, 5), -1e6, requires_grad=True)})


def test_printing(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 4)
    assert repr(store) == f"RepresentationCache({str(tmp_path)!r}, 4 x {{'a': 5}})"

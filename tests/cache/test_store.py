from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mvmr_loss.cache import (
    RepresentationCache,
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

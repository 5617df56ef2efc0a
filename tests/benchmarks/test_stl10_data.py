"""STL10's format and the other data sets, their order, and what is said of damaged or missing ones."""

import shutil

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

from benchmarks.common.photographs import Photographs
from benchmarks.stl10.data import (
    ArrayImages,
    EpochSampler,
    FolderImages,
    Indexed,
    Normalize,
    Part,
    _Joined,
    in_order,
    load_data,
    train_loader,
)
from benchmarks.stl10.settings import Settings

STL10 = torchvision.datasets.STL10


def settings(root, **options):
    return Settings(**{"data": "stl10", "data_dir": str(root), "batch_size": 8, **options})


def tensors(images):
    return torch.stack([TF.pil_to_tensor(image) for image in images])


@pytest.fixture
def copied(stl10_files, tmp_path):
    """A copy of STL10's files that a test may damage: (what --data-dir names, the folder)."""
    shutil.copytree(stl10_files.root, tmp_path / "data")
    return tmp_path / "data", tmp_path / "data" / STL10.base_folder


def test_stl10_is_read_as_it_was_written(stl10_files):
    data = load_data(settings(stl10_files.root))
    for images, name in ((data.train, "train"), (data.test, "test")):
        pixels, labels = images.__getitems__(range(len(images)))
        assert torch.equal(pixels, tensors(stl10_files.images[name]))
        assert labels.tolist() == stl10_files.labels[name]
    assert data.train_labels.tolist() == stl10_files.labels["train"]
    assert [fold.tolist() for fold in data.folds] == stl10_files.folds
    assert data.classes == Photographs("test").classes[:10]


def test_stl10_is_pretrained_on_train_and_unlabeled(stl10_files):
    data = load_data(settings(stl10_files.root))
    pixels, labels = data.pretrain.__getitems__(range(len(data.pretrain)))
    expected = [*stl10_files.images["train"], *stl10_files.images["unlabeled"]]
    assert torch.equal(pixels, tensors(expected))
    unlabeled = [-1] * len(stl10_files.images["unlabeled"])
    assert labels.tolist() == [*stl10_files.labels["train"], *unlabeled]


def test_stl10_at_another_size(stl10_files):
    data = load_data(settings(stl10_files.root, image_size=32))
    pixels, labels = data.test.__getitems__([4, 1])
    expected = TF.resize(tensors(stl10_files.images["test"])[[4, 1]], [32, 32])
    assert torch.equal(pixels, expected)
    assert labels.tolist() == [4, 1]


def test_stl10_without_folds_and_names(copied):
    root, folder = copied
    (folder / "fold_indices.txt").unlink()
    (folder / "class_names.txt").unlink()
    data = load_data(settings(root))
    assert data.folds == []
    assert data.classes == [str(i) for i in range(1, 11)]


def test_download(stl10_archive, stl10_files, tmp_path):
    data = load_data(settings(tmp_path / "data", download=True))
    assert torch.equal(data.test.__getitems__([0])[0], tensors(stl10_files.images["test"][:1]))


def test_a_half_downloaded_archive_is_downloaded_again(stl10_archive, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    content = stl10_archive.read_bytes()
    (root / STL10.filename).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"stl10_binary.tar.gz is damaged or only a part: its \d+"):
        load_data(settings(root))
    assert len(load_data(settings(root, download=True)).test) == 30


def test_an_interrupted_unpacking_is_made_good(stl10_archive, copied):
    root, folder = copied
    shutil.copy(stl10_archive, root)
    (folder / "test_X.bin").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete: test_X.bin missing in .*Run with"):
        load_data(settings(root))
    assert len(load_data(settings(root, download=True)).test) == 30


def test_exception_download(stl10_archive, tmp_path):
    whole = stl10_archive.read_bytes()
    stl10_archive.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged or only a part"):
        load_data(settings(tmp_path / "a", download=True))
    stl10_archive.unlink()
    with pytest.raises(
        FileNotFoundError, match="stl10 could not be downloaded.*put its files into"
    ):
        load_data(settings(tmp_path / "b", download=True))


def test_exception_stl10_missing(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="stl10 must be in .* but is not there; run with --d"
    ):
        load_data(settings(tmp_path))
    with pytest.raises(FileNotFoundError, match="cifar10 must be in .* but is not there; run with"):
        load_data(settings(tmp_path, data="cifar10"))


def test_exception_stl10_corrupted(copied):
    root, folder = copied
    path = folder / "unlabeled_X.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"unlabeled_X.bin is damaged: its {len(content) - 1} by"):
        load_data(settings(root))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        ValueError, match="unlabeled_X.bin is damaged.*Delete it and run with --down"
    ):
        load_data(settings(root))


@pytest.mark.parametrize("line", ["", "3 four", "0 60", "-1 2"])
def test_exception_folds(copied, line):
    root, folder = copied
    lines = (folder / "fold_indices.txt").read_text().splitlines()
    (folder / "fold_indices.txt").write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(
        ValueError, match="line 2 of .*fold_indices.txt must hold indices of the 60"
    ):
        load_data(settings(root))
    (folder / "fold_indices.txt").unlink()
    with pytest.raises(FileNotFoundError, match="must list STL10's folds but is missing"):
        load_data(settings(root, labels=["folds"]))


@pytest.fixture
def folder(tmp_path):
    """A folder of images with two classes: train/, unlabeled/ and test/."""
    for split, count in (("train", 4), ("unlabeled", 3), ("test", 2)):
        photographs = Photographs(
            "test" if split == "test" else "train", crops_per_class=count, crop_size=40
        )
        for i in range(2 * count):
            image, label = photographs[i]
            name = "any" if split == "unlabeled" else "ab"[label]
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_folder(folder):
    data = load_data(Settings(data=str(folder), image_size=40))
    assert (len(data.pretrain), len(data.train), len(data.test)) == (14, 8, 4)
    assert data.classes == ["a", "b"]
    # The two parts of a batch keep their places.
    pixels, labels = data.pretrain.__getitems__([9, 1, 13, 0])
    alone = [data.pretrain.__getitems__([i])[0] for i in (9, 1, 13, 0)]
    assert torch.equal(pixels, torch.cat(alone))
    assert labels.tolist() == [-1, 0, -1, 0]
    first = TF.pil_to_tensor(Photographs("train", crops_per_class=4, crop_size=40)[0][0])
    assert torch.equal(pixels[3], first)


def test_a_folder_too_large_for_memory_is_read_as_needed(folder, monkeypatch):
    whole = load_data(Settings(data=str(folder), image_size=32))
    monkeypatch.setattr("benchmarks.stl10.data.MEMORY_LIMIT", 0)
    data = load_data(Settings(data=str(folder), image_size=32))
    assert isinstance(data.train, FolderImages)
    assert isinstance(data.pretrain, _Joined)
    index = [13, 2, 5, 8]
    for now, before in zip(
        data.pretrain.__getitems__(index), whole.pretrain.__getitems__(index), strict=True
    ):
        assert torch.equal(now, before)


def test_exception_folder(folder):
    with pytest.raises(
        FileNotFoundError, match="data must be stl10, cifar10, photographs or a fold"
    ):
        load_data(Settings(data=str(folder / "absent")))
    path = next((folder / "test" / "a").iterdir())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read as an image"):
        load_data(Settings(data=str(folder), image_size=32))
    shutil.move(folder / "test" / "a", folder / "test" / "c")
    with pytest.raises(ValueError, match="must have the same classes but a, c are in one only"):
        load_data(Settings(data=str(folder), image_size=32))
    shutil.rmtree(folder / "test")
    with pytest.raises(FileNotFoundError, match="test must be a folder with one folder of images"):
        load_data(Settings(data=str(folder), image_size=32))


def arrays(count=10):
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((3, 2, 2), np.uint8)
    return ArrayImages(pixels, np.arange(count) % 3)


def test_sampler_order_depends_on_seed_and_epoch_alone():
    def batches(seed, epoch):
        sampler = EpochSampler(10, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 3) == batches(0, 3)
    assert batches(0, 3) != batches(0, 4)
    assert batches(0, 3) != batches(1, 3)
    drawn = [i for batch in batches(0, 0) for i in batch]
    assert len(set(drawn)) == len(drawn) == 8


def test_sampler_shares_each_batch_among_processes():
    whole = list(EpochSampler(10, 4, 0))
    parts = [list(EpochSampler(10, 4, 0, rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(batch)


def test_exception_sampler():
    with pytest.raises(ValueError, match="batch_size must be at most the number of images, 3, but"):
        EpochSampler(3, 4, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders(num_workers):
    images, labels, index = next(
        iter(train_loader(Indexed(arrays()), EpochSampler(10, 4, 0), num_workers))
    )
    assert images[:, 0, 0, 0].tolist() == index.tolist()
    assert labels.tolist() == (index % 3).tolist()
    part = Part(arrays(), [7, 1, 4])
    ((images, labels),) = in_order(part, num_workers)
    assert images[:, 0, 0, 0].tolist() == [7, 1, 4]
    assert labels.tolist() == [1, 1, 1]


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = TF.normalize(images / 255, [0.491, 0.482, 0.447], [0.247, 0.243, 0.261])
    torch.testing.assert_close(Normalize("cifar")(images), expected)

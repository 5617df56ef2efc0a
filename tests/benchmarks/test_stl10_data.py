"""STL10's format and the other data sets, their order, and what is said of damaged or missing ones."""

import pickle
import shutil

import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

from benchmarks.common.photographs import Photographs
from benchmarks.stl10.data import (
    Transformed,
    finetuning,
    load_data,
    plain,
    pretraining_set,
    subset,
    views,
)
from benchmarks.stl10.evaluate import crop_of_ten
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
        assert torch.equal(tensors(image for image, _ in images), tensors(stl10_files.images[name]))
        assert [int(label) for _, label in images] == stl10_files.labels[name]
    assert data.labels.tolist() == stl10_files.labels["train"]
    assert [fold.tolist() for fold in data.folds] == stl10_files.folds
    assert data.classes == Photographs("test").classes[:10]


def test_stl10_is_pretrained_on_train_and_unlabeled(stl10_files):
    data = load_data(settings(stl10_files.root))
    expected = [*stl10_files.images["train"], *stl10_files.images["unlabeled"]]
    assert torch.equal(tensors(image for image, _ in data.pretrain), tensors(expected))
    labels = [int(label) for _, label in data.pretrain]
    assert labels == [*stl10_files.labels["train"], *[-1] * len(stl10_files.images["unlabeled"])]


@pytest.mark.parametrize(("method", "count"), [("mvmr", 2), ("simclr", 3)])
def test_views_and_their_size(stl10_files, method, count):
    chosen = settings(stl10_files.root, image_size=32, method=method, normalization="cifar")
    data = load_data(chosen)
    dataset = pretraining_set(data, chosen)
    images, label, name = dataset[4]
    assert [tuple(view.shape) for view in images] == [(3, 32, 32)] * count
    assert (label, len(dataset)) == (stl10_files.labels["train"][4], 120)
    assert name != dataset[5][2]
    # The first is the image as it is, normalised as the settings say.
    small = TF.resize(stl10_files.images["train"][4], [32, 32])
    plain = TF.normalize(
        TF.pil_to_tensor(small) / 255, [0.491, 0.482, 0.447], [0.247, 0.243, 0.261]
    )
    torch.testing.assert_close(images[0], plain, rtol=0, atol=0.03)
    # What other parts read stays a picture.
    assert data.pretrain[0][0].size == (96, 96)


def test_augmentation_is_the_settings():
    chosen = Settings(crop_scale_min=0.3, color_jitter=[0.1, 0.2, 0.3, 0.4], blur=False)
    words = str(views(chosen).transforms[1].transform)
    for part in ("scale=(0.3, 1.0)", "brightness=(0.9, 1.1)", "hue=(-0.4, 0.4)"):
        assert part in words


def test_stl10_without_folds_and_names(copied):
    root, folder = copied
    (folder / "fold_indices.txt").unlink()
    (folder / "class_names.txt").unlink()
    data = load_data(settings(root))
    assert data.folds == []
    assert data.classes == [str(i) for i in range(1, 11)]


def test_download(stl10_archive, stl10_files, tmp_path):
    data = load_data(settings(tmp_path / "data", download=True))
    assert torch.equal(tensors([data.test[0][0]]), tensors(stl10_files.images["test"][:1]))


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
    with pytest.raises(FileNotFoundError, match="but test_X.bin are missing; run with"):
        load_data(settings(root))
    assert len(load_data(settings(root, download=True)).test) == 30


def test_exception_download(stl10_archive, tmp_path):
    whole = stl10_archive.read_bytes()
    stl10_archive.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged or only a part"):
        load_data(settings(tmp_path / "a", download=True))
    stl10_archive.unlink()
    with pytest.raises(
        FileNotFoundError, match="STL10 could not be downloaded.*put its files into"
    ):
        load_data(settings(tmp_path / "b", download=True))


def test_exception_stl10_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="STL10 must be in .* are missing; run with --d"):
        load_data(settings(tmp_path))
    with pytest.raises(FileNotFoundError, match="CIFAR10 must be in .* are missing; run with"):
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
    data = load_data(Settings(data=str(folder), batch_size=4))
    assert (len(data.pretrain), len(data.train), len(data.test)) == (14, 8, 4)
    assert data.classes == ["a", "b"]
    assert [label for _, label in data.pretrain] == [0] * 4 + [1] * 4 + [-1] * 6
    image, label = data.train[0]
    assert (image.size, label) == ((40, 40), 0)


def test_worker_processes_are_sent_every_data_set(folder):
    """Pickled, as where processes are spawned, and the same on the other side."""
    chosen = Settings(data=str(folder), image_size=32, method="simclr")
    data = load_data(chosen)
    small = subset(data, [1, 6])
    for dataset in (
        pretraining_set(data, chosen),
        *(Transformed(data.test, crop_of_ten(i, chosen)) for i in (0, 9)),
        *(Transformed(small, transform(chosen)) for transform in (plain, finetuning)),
    ):
        sent = pickle.loads(pickle.dumps(dataset))
        for i in (0, len(dataset) - 1):
            torch.manual_seed(i)
            expected = dataset[i]
            torch.manual_seed(i)
            torch.testing.assert_close(sent[i][:2], expected[:2], rtol=0, atol=0)


def test_ten_crops_are_ten():
    chosen = Settings(image_size=32)
    image, _ = Photographs("test", crops_per_class=1, crop_size=48)[0]
    crops = torch.stack([crop_of_ten(i, chosen)(image) for i in range(10)])
    assert crops.shape == (10, 3, 32, 32)
    assert len(crops.unique(dim=0)) == 10
    torch.testing.assert_close(crops[5:9], crops[:4].flip(-1)[[1, 0, 3, 2]])


def test_exception_folder(folder):
    with pytest.raises(
        FileNotFoundError, match="data must be stl10, cifar10, photographs or a fold"
    ):
        load_data(Settings(data=str(folder / "absent")))
    path = next((folder / "test" / "a").iterdir())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read as an image"):
        list(load_data(Settings(data=str(folder), batch_size=4)).test)
    shutil.move(folder / "test" / "a", folder / "test" / "c")
    with pytest.raises(ValueError, match="must have the same classes but a, c are in one only"):
        load_data(Settings(data=str(folder)))
    shutil.rmtree(folder / "test")
    with pytest.raises(FileNotFoundError, match="test must be a folder with one folder of images"):
        load_data(Settings(data=str(folder), image_size=32))

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset, TensorDataset

from mvmr_loss.cache import (
    IndexedDataset,
    dataset_fingerprint,
    fill,
)
from tests.cache.helpers import (
    PlainDataset,
    cached,
)


def test_loader_with_samplers_and_epochs(tmp_path, images):
    dataset = IndexedDataset(list(zip(images, range(20), strict=True)))
    module = cached(tmp_path)
    for rank in range(2):
        sampler = DistributedSampler(dataset, 2, rank, seed=1)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for indices, x, labels in DataLoader(dataset, 3, sampler=sampler):
                rows = module(x, indices)
                assert torch.equal(indices, labels)
                assert torch.equal(rows["pixels"], images[indices].flatten(1).half().float())
    subset = Subset(dataset, [5, 7, 19])
    indices, x, _ = next(iter(DataLoader(subset, 3)))
    assert indices.tolist() == [5, 7, 19]
    assert torch.equal(module(x, indices)["pixels"], images[indices].flatten(1).half().float())


def test_indexed_dataset(images):
    assert IndexedDataset(images)[3][0] == 3
    assert torch.equal(IndexedDataset(images)[3][1], images[3])
    assert IndexedDataset([["a", 1]])[0] == (0, "a", 1)
    assert len(IndexedDataset(images)) == 20
    with pytest.raises(TypeError, match="must have a length"):
        IndexedDataset(iter([]))


def test_fill(tmp_path, images):
    module = cached(tmp_path, dataset=images)
    module(images[:3], [0, 1, 2])
    seen = []
    counts = [
        fill(module, images, batch_size=4, share=(k, 2), progress=lambda *p: seen.append(p))
        for k in range(2)
    ]
    assert counts == [8, 9]
    assert seen[1] == (8, 8)
    assert fill(module, images, num_workers=2) == 0
    assert torch.equal(module(None, range(20))["pixels"], images.flatten(1).half().float())
    with pytest.raises(ValueError, match="the 20 samples of the cache at .* but has 19"):
        fill(module, images[:19])


@pytest.mark.parametrize("kind", ["torchvision", "lightly", "plain"])
def test_kinds_of_data_sets(kind, image_folder, tmp_path):
    from lightly.data import LightlyDataset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import center_crop, to_dtype, to_image

    def transform(image):
        return to_dtype(to_image(center_crop(image, [32])), torch.float32, scale=True)

    folder = ImageFolder(image_folder, transform)
    images = torch.stack([image for image, _ in folder])
    dataset = {
        "torchvision": lambda: folder,
        "lightly": lambda: LightlyDataset(str(image_folder), transform=transform),
        "plain": lambda: PlainDataset(images),
    }[kind]()
    module = cached(tmp_path / "s", num_samples=12, fingerprint=dataset_fingerprint(dataset))
    for _ in range(2):
        for indices, x, *_ in DataLoader(IndexedDataset(dataset), 5, shuffle=True):
            assert torch.equal(x, images[indices])
            y = module(x, indices)["pixels"]
            assert torch.equal(y, images[indices].flatten(1).half().float())
    assert fill(module, dataset) == 0


def test_fingerprints_tell_data_sets_apart(image_folder, tmp_path):
    from lightly.data import LightlyDataset
    from torchvision.datasets import ImageFolder

    def same():
        return dataset_fingerprint(ImageFolder(image_folder))

    original = same()
    assert original == same()
    assert original == dataset_fingerprint(LightlyDataset(str(image_folder)))
    assert original == dataset_fingerprint(IndexedDataset(ImageFolder(image_folder)))
    moved = image_folder.rename(tmp_path / "elsewhere")
    assert original == dataset_fingerprint(ImageFolder(moved))
    subset = Subset(ImageFolder(moved), [0, 1])
    assert dataset_fingerprint(subset) != dataset_fingerprint(Subset(ImageFolder(moved), [0, 2]))
    file = next(moved.glob("class0/*.png"))
    content = file.read_bytes()
    file.write_bytes(content + b"x")
    assert original != dataset_fingerprint(ImageFolder(moved))
    file.write_bytes(content)
    assert original == dataset_fingerprint(ImageFolder(moved))
    file.rename(file.with_name("renamed.png"))
    assert original != dataset_fingerprint(ImageFolder(moved))


def test_fingerprint_of_data_in_memory():
    class InMemory(list):
        data = torch.arange(24).view(4, 6)

    dataset, other = InMemory(range(4)), InMemory(range(4))
    assert dataset_fingerprint(dataset) == dataset_fingerprint(other)
    other.data = dataset.data.clone()
    other.data[2, 3] += 1
    assert dataset_fingerprint(dataset) != dataset_fingerprint(other)
    other.data = dataset.data.numpy()
    assert dataset_fingerprint(dataset) == dataset_fingerprint(other)
    with pytest.raises(TypeError, match="must have a length"):
        dataset_fingerprint(iter([]))


def test_fingerprint_does_not_depend_on_the_working_directory(image_folder, tmp_path, monkeypatch):
    from lightly.data import LightlyDataset
    from torchvision.datasets import ImageFolder

    class WithoutRoot(list):
        pass

    def fingerprints(folder):
        labelled = ImageFolder(folder)
        without_root = WithoutRoot(range(12))
        without_root.samples = labelled.samples
        below_root = WithoutRoot(range(12))
        below_root.root = folder
        below_root.images = [os.path.relpath(file, folder) for file, _ in labelled.samples]
        names = PlainDataset(np.array([file for file, _ in labelled.samples]))
        sets = (labelled, LightlyDataset(str(folder)), without_root, below_root, names)
        return [dataset_fingerprint(dataset) for dataset in sets]

    expected = fingerprints(image_folder)
    for directory, folder in (
        (tmp_path, "images"),
        (image_folder, "."),
        (image_folder, "../images"),
    ):
        monkeypatch.chdir(directory)
        assert fingerprints(folder) == expected


def test_fingerprints_see_content_and_order():
    class Reordered(PlainDataset):
        def __init__(self, dataset, order):
            self.dataset, self.order = dataset, order

        def __len__(self):
            return len(self.order)

    x = torch.rand(6, 3)
    y = x.flip(0)
    several = [
        (TensorDataset(x), TensorDataset(y)),
        (
            ConcatDataset([TensorDataset(x), TensorDataset(y)]),
            ConcatDataset([TensorDataset(y), TensorDataset(x)]),
        ),
        (PlainDataset(np.array(["a", "b"])), PlainDataset(np.array(["b", "a"]))),
        (PlainDataset(x), PlainDataset(y)),
        (Reordered(x, np.arange(6)), Reordered(x, np.arange(6)[::-1])),
        (Reordered(x, [0, 1, 2]), Reordered(x, [0, 2, 1])),
    ]
    for a, b in several:
        assert dataset_fingerprint(a) == dataset_fingerprint(copy.deepcopy(a))
        assert dataset_fingerprint(a) != dataset_fingerprint(b)

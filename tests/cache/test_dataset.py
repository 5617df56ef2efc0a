from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    StackDataset,
    Subset,
    TensorDataset,
    random_split,
)
from torchvision.transforms.functional import to_pil_image

from mvmr_loss import Representations
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


def test_fill_computes_what_is_kept_alone(tmp_path, images):
    """The augmentations of a training do not depend on who filled the store."""

    def first(folder, filled):
        module = cached(tmp_path / folder, ["pixels", "augmented_pixels"], dataset=images)
        if filled:
            assert fill(module, images) == 20
        return module(images, range(20))["augmented_pixels"]

    assert torch.equal(first("a", True), first("b", False))
    module = cached(tmp_path / "c", ["pixels", "augmented_pixels"])
    with pytest.raises(ValueError, match="images must be normalised with mean"):
        fill(module, images * 255)


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "cut short"])
@pytest.mark.parametrize("which", [0, 3])
def test_fill_with_a_broken_image(image_folder, tmp_path, which, content):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import center_crop, pil_to_tensor

    def transform(image):
        return pil_to_tensor(center_crop(image, [16])).float() / 255

    dataset = ImageFolder(image_folder, transform)
    broken = Path(dataset.samples[which][0])
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    module = Representations(["pixels"], cache=tmp_path / "store")
    with pytest.raises(ValueError, match=rf"image {which} .*{broken.name}\) cannot be read"):
        fill(module, dataset, batch_size=7)
    assert module.cache.store.is_valid().tolist() == [i < 7 and i != which for i in range(12)]
    said = []
    assert fill(module, dataset, batch_size=7, on_broken=said.append) == 5
    assert len(said) == 1
    assert broken.name in said[0]
    assert module.cache.store.is_valid().tolist() == [i != which for i in range(12)]


class Samples:
    """Ten images, each in a sample of some kind."""

    def __init__(self, images, make):
        self.images, self.make = images[:10], make

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.make(self.images[range(10)[index]])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x, 1),
        lambda x: (x, x + 1, 1),
        lambda x: ((x, x + 1), 1),
        lambda x: [[x, x + 1], 1],
        lambda x: ([(x, x + 1), x + 2],),
        lambda x: (x.numpy(), 1),
    ],
    ids=["image", "label", "flat", "tuple", "list", "nested", "array"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_fill_takes_the_first_view(tmp_path, images, make, num_workers):
    module = cached(tmp_path, num_samples=None)
    assert fill(module, Samples(images, make), num_workers=num_workers) == 10
    rows = module(None, range(10))["pixels"]
    assert torch.equal(rows, images[:10].flatten(1).half().float())


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda x: {"image": x, "label": 1}, "is a dict of 'image', 'label'; give a data set"),
        (lambda x: ({"image": x}, 1), "is a dict of 'image';"),
        (lambda x: (to_pil_image(x), 1), "is a Image;"),
        (lambda x: ("a.png", 1), "is a str;"),
        (lambda x: (), "is a list;"),
        (lambda x: ([], 1), "is a list;"),
        (lambda x: (1, x), "is a int;"),
    ],
    ids=["dict", "dict in a tuple", "PIL", "path", "nothing", "no views", "label first"],
)
def test_fill_says_what_samples_must_be(tmp_path, images, make, given):
    module, said = cached(tmp_path, num_samples=None), []
    match = rf"samples of the data set must be .* \(C, H, W\), but that of sample 0 {given}"
    with pytest.raises(TypeError, match=match):
        fill(module, Samples(images, make), on_broken=said.append)
    assert said == []


def test_fill_wants_images_of_one_shape(tmp_path, images):
    module = cached(tmp_path, num_samples=None)
    with pytest.raises(
        ValueError, match=r"image 1 has \(3, 8, 9\) and image 0 \(3, 8, 8\); resize"
    ):
        fill(module, [images[0], torch.zeros(3, 8, 9)])


def test_fill_needs_a_cache_and_finds_the_images_behind_an_index(tmp_path, images):
    with pytest.raises(ValueError, match="representations must have a cache to fill"):
        fill(Representations(["pixels"]), images)
    module = Representations(["pixels"], cache=tmp_path)
    assert fill(module, IndexedDataset(images)) == 20
    assert torch.equal(module(None, range(20))["pixels"], images.flatten(1).half().float())


@pytest.mark.parametrize("share", [(1, 1), (2, 2), (-1, 2), (0, 0), (0.0, 1), (0, 2.0)])
def test_fill_of_a_share_that_is_none(tmp_path, images, share):
    module = Representations(["pixels"], cache=tmp_path / "s")
    with pytest.raises(ValueError, match=r"share must be \(k, n\), .* counted from 0, but is"):
        fill(module, images, share=share)
    assert fill(module, images, share=(0, 2)) == fill(module, images, share=(1, 2)) == 10


def test_fill_goes_on_after_a_data_set_that_is_none(tmp_path, images):
    module = Representations(["pixels"], cache=tmp_path / "s")
    with pytest.raises(TypeError, match="length and items by index.* but is a DataLoader"):
        fill(module, DataLoader(images, 4))
    assert fill(module, images) == 20
    again = Representations(["pixels"], cache=tmp_path / "s")
    with pytest.raises(ValueError, match="num_samples is 20 there but 8 here"):
        fill(again, images[:8])
    assert fill(again, images) == 0


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
    module = cached(tmp_path / "s", num_samples=None, dataset=dataset)
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


class Reordered(PlainDataset):
    def __init__(self, dataset, order):
        self.dataset, self.order = dataset, order

    def __len__(self):
        return len(self.order)


class Wrapped(PlainDataset):
    """Under another name than ``dataset``, with an order that is no attribute of the inner one."""

    def __init__(self, base, order):
        self.base, self.order = base, order

    def __len__(self):
        return len(self.base)


class Several(PlainDataset):
    def __init__(self, parts):
        self.by_name = parts

    def __len__(self):
        return sum(map(len, self.by_name.values()))


@dataclasses.dataclass
class Record:
    label: int
    file: str


class Arrow:
    """What the fingerprint asks of a data set of Hugging Face's library: raw rows."""

    column_names = ("image",)

    def __init__(self, rows):
        self.rows = rows

    def with_format(self, kind):
        assert kind == "arrow"
        return [SimpleNamespace(to_pydict=lambda row=row: {"image": [row]}) for row in self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        raise AssertionError("images must not be decoded")


X = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
Y = X.flip(0)
FILES = [f"{i}.png" for i in range(200)]
# One name differs, which is none of 64 evenly spaced ones.
OTHERS = [*FILES[:101], "other.png", *FILES[102:]]
PAIRS = {
    "tensors": (TensorDataset(X), TensorDataset(Y)),
    "tensors and labels": (TensorDataset(X, X[:, 0]), TensorDataset(Y, X[:, 0])),
    "concatenation": (
        ConcatDataset([TensorDataset(X), TensorDataset(Y)]),
        ConcatDataset([TensorDataset(Y), TensorDataset(X)]),
    ),
    "split": tuple(
        random_split(TensorDataset(X), [3, 3], torch.Generator().manual_seed(s))[0] for s in (0, 2)
    ),
    "subset of a concatenation": tuple(
        Subset(ConcatDataset([TensorDataset(X), TensorDataset(Y)]), i) for i in ([0, 7], [7, 0])
    ),
    "stack": (StackDataset(a=TensorDataset(X)), StackDataset(a=TensorDataset(Y))),
    "names in an array": (PlainDataset(np.array(FILES)), PlainDataset(np.array(OTHERS))),
    "names in a list": (PlainDataset(FILES), PlainDataset(OTHERS)),
    "names in a frame": tuple(
        PlainDataset(pandas.DataFrame({"label": range(200), "file": names}))
        for names in (FILES, OTHERS)
    ),
    "labels and names": tuple(PlainDataset(list(enumerate(f))) for f in (FILES, OTHERS)),
    "records": tuple(
        PlainDataset([{"label": i, "file": name} for i, name in enumerate(names)])
        for names in (FILES, OTHERS)
    ),
    "objects": (PlainDataset([Record(0, "a"), Record(0, "b")]), PlainDataset([Record(0, "b")] * 2)),
    "arrays": (PlainDataset(X.numpy()), PlainDataset(Y.numpy())),
    "tensor": (PlainDataset(X), PlainDataset(Y)),
    "arrow": (Arrow([b"a", b"b"]), Arrow([b"b", b"a"])),
    "in arrow's order": (
        Wrapped(Arrow([b"a", b"b"]), [0, 1]),
        Wrapped(Arrow([b"b", b"a"]), [0, 1]),
    ),
    "order": (Reordered(X, np.arange(6)), Reordered(X, np.arange(6)[::-1])),
    "shorter order": (Reordered(X, [0, 1, 2]), Reordered(X, [0, 2, 1])),
    "another wrapper's order": tuple(
        Wrapped(TensorDataset(X), order) for order in (list(range(6)), [1, 0, 2, 3, 4, 5])
    ),
    "another wrapper's content": tuple(Wrapped(TensorDataset(x), list(range(6))) for x in (X, Y)),
    "several by name": tuple(
        Several({"a": TensorDataset(x), "b": TensorDataset(X)}) for x in (X, Y)
    ),
}

RAMP = torch.arange(150.0).view(75, 2)
STORED = {
    "numbers": ([1, 2, 3], "3-ca94eb4c1aeafbe9"),
    "numbers and nothing": ([0.5, None], "2-6b3c7fa7075956a1"),
    "names": (["a/x.png", "a/y.png", "a/b/z.png"], "3-4e86dd40684bfb78"),
    "tensor": (PlainDataset(RAMP), "75-a68943d27be9b9fd"),
    "tensors": (TensorDataset(RAMP, RAMP[:, 0].long()), "75-529cd24e9c502d59"),
    "array": (PlainDataset(RAMP.int().numpy()), "75-1c6f396d52b1e2b1"),
    "records": ([{"label": 3, "file": "a"}, {"label": 4, "file": "b"}], "2-a125526e15ccb8f4"),
    "texts and numbers": ([("a", 1), ("b", 2, 3)], "2-68bd954ac08a54a0"),
    "subset": (Subset(TensorDataset(RAMP), [3, 1]), "2-0e644f2a96849b7a"),
    "arrow": (Arrow([b"a", b"b"]), "2-938752662337e67a"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_fingerprints_see_content_and_order(kind):
    a, b = PAIRS[kind]
    assert dataset_fingerprint(a) == dataset_fingerprint(copy.deepcopy(a))
    assert dataset_fingerprint(a) == dataset_fingerprint(IndexedDataset(a))
    assert dataset_fingerprint(a) != dataset_fingerprint(b)


def test_a_data_set_that_knows_its_whole():
    whole = Wrapped(None, [])
    part = TensorDataset(X)
    part.owner, whole.base = whole, part
    assert dataset_fingerprint(whole) == dataset_fingerprint(whole)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16])
@pytest.mark.parametrize("kind", [np.array, torch.as_tensor])
def test_every_integer_counts(dtype, kind):
    """As an order's: not only 64 of them, and whatever holds them."""
    numbers = np.arange(200).astype(dtype)
    swapped = numbers.copy()
    swapped[[100, 101]] = swapped[[101, 100]]
    found, other = (dataset_fingerprint(PlainDataset(kind(n))) for n in (numbers, swapped))
    assert found != other
    assert found == dataset_fingerprint(PlainDataset(numbers.tolist()))


@pytest.mark.parametrize("single", [np.float64(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_a_single_number_is_no_content(single):
    dataset = PlainDataset(X)
    dataset.scale = single
    assert dataset_fingerprint(dataset) == dataset_fingerprint(PlainDataset(X))


def test_the_layout_in_memory_plays_no_part():
    wide = torch.zeros(6, 6)
    wide[:, ::2] = X
    expected = dataset_fingerprint(PlainDataset(X))
    for same in (wide[:, ::2], X.T.contiguous().T, X.clone().requires_grad_(), X.numpy()):
        assert dataset_fingerprint(PlainDataset(same)) == expected


@pytest.mark.parametrize("name", ["b/./c.png", "b//c.png", "x/../b/c.png", "./b/c.png"])
@pytest.mark.parametrize("root", ["/data", "/data/", "data", None])
def test_names_are_those_of_the_same_files(name, root):
    def of(name):
        dataset = PlainDataset([0, 0])
        dataset.samples = [os.path.join(root or "/data", each) for each in (name, "a/d.png")]
        dataset.root = root
        return dataset_fingerprint(dataset)

    assert of(name) == of("b/c.png")
    assert of(name) != of("b/e.png")


def test_absolute_and_relative_names_may_be_mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = dataset_fingerprint(PlainDataset([str(tmp_path / "a.png"), "b.png"]))
    assert mixed == dataset_fingerprint(PlainDataset(["a.png", "b.png"]))
    monkeypatch.chdir(tmp_path.parent)
    above = [str(tmp_path / "a.png"), f"{tmp_path.name}/b.png"]
    assert dataset_fingerprint(PlainDataset(above)) == mixed


@pytest.mark.parametrize("kind", STORED)
def test_fingerprints_are_those_of_stores_made_before(kind):
    """With another one, a store would be refused."""
    dataset, expected = STORED[kind]
    assert dataset_fingerprint(dataset) == expected


class InWorkers(PlainDataset):
    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is None:
            raise RuntimeError("is not read in a worker")
        return super().__getitem__(index)


def test_fill_reads_in_workers(tmp_path, images):
    dataset = InWorkers(images[:4])
    with pytest.raises(ValueError, match="image 0 cannot be read: is not read in a worker"):
        fill(Representations(["pixels"], cache=tmp_path / "a"), dataset)
    assert fill(Representations(["pixels"], cache=tmp_path / "b"), dataset, num_workers=1) == 4


@pytest.mark.parametrize("attribute", ["column_names", "with_format"])
def test_half_of_what_tells_an_arrow_data_set_is_none(attribute):
    dataset = PlainDataset(X)
    setattr(dataset, attribute, ("image",))
    assert dataset_fingerprint(dataset) == dataset_fingerprint(PlainDataset(X))


def test_of_records_the_first_name_counts():
    """The others are labels, which change no features."""

    def of(*records):
        return dataset_fingerprint(PlainDataset(list(records)))

    expected = of(("a.png", "cat"), ("b.png", "dog"))
    assert of(("a.png", "dog"), ("b.png", "dog")) == expected
    assert of(("c.png", "cat"), ("b.png", "dog")) != expected
    # Without any name, all columns count.
    assert of((1, 2.0), (3, 4.0)) != of((1, 2.0), (3, 5.0))


@pytest.mark.parametrize("form", [tuple, dict, "table"])
def test_of_records_the_names_count_wherever_they_stand(form):
    def of(names):
        rows = [{"label": f"class{i % 3}", "path": name} for i, name in enumerate(names)]
        if form == "table":
            return dataset_fingerprint(PlainDataset(pandas.DataFrame(rows)))
        return dataset_fingerprint(
            PlainDataset([row if form is dict else tuple(row.values()) for row in rows])
        )

    names = [f"{i}.png" for i in range(9)]
    assert of(names) == of(list(names))
    assert of(names) != of([*names[:-1], "other.png"])
    assert of(names) != of(names[::-1])


FRAME = pandas.DataFrame({"weight": np.linspace(0, 1, 90), "kind": ["a", "b", "c"] * 30})


@pytest.mark.parametrize(
    "column",
    [
        FRAME[FRAME.weight > 0.5].weight,
        FRAME[FRAME.weight > 0.5].kind,
        FRAME[FRAME.weight > 0.5].kind.astype("category"),
        pandas.Series(pandas.date_range("2020-01-01", periods=40))[8:],
        FRAME[FRAME.weight > 0.5].weight > 0.7,
        np.array([b"a", b"b", b"c"]),
        np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]"),
        np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f4")]),
        torch.eye(3).to_sparse(),
        [""] * 4,
    ],
    ids=lambda column: f"{type(column).__name__}-{getattr(column, 'dtype', '')}",
)
def test_any_column_may_be_an_attribute(column):
    dataset = PlainDataset(column)
    found = dataset_fingerprint(dataset)
    assert found == dataset_fingerprint(PlainDataset(copy.deepcopy(column)))
    assert found.startswith(f"{len(column)}-")
    if not isinstance(column, (list, torch.Tensor)):
        assert found != dataset_fingerprint(PlainDataset(column[::-1]))


def test_a_part_may_know_its_whole(tmp_path, images):
    part = PlainDataset(list(images))
    part.dataset = ConcatDataset([part])
    module = cached(tmp_path)
    module.open_cache(part.dataset)
    assert module.cache.num_samples == 20


def test_parts_with_indices_of_their_own_are_refused(tmp_path, images):
    parts = [IndexedDataset(list(images[:10])), IndexedDataset(list(images[10:]))]
    for dataset in (ConcatDataset(parts), Subset(ConcatDataset(parts), range(4))):
        with pytest.raises(ValueError, match="must be indexed as a whole but has 2 parts"):
            cached(tmp_path).open_cache(dataset)
    whole = IndexedDataset(ConcatDataset([list(images[:10]), list(images[10:])]))
    for dataset in (
        whole,
        Subset(whole, [3, 5]),
        ConcatDataset([Subset(whole, [3, 5]), Subset(whole, [7])]),
    ):
        module = cached(tmp_path)
        module.open_cache(dataset)
        assert module.cache.num_samples == 20

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset
from torchvision.transforms.functional import to_tensor

from benchmarks.common.photographs import Photographs
from mvmr_loss import Normalization, Representations
from mvmr_loss.cache import IndexedDataset, RepresentationCache, dataset_fingerprint
from mvmr_loss.cache.rows import _test_image
from mvmr_loss.representations import Pixels, Representation
from tests.cache.helpers import (
    NAMES,
    Counting,
    as_nobody,
    cached,
    snapshot,
)


def test_second_epoch_computes_nothing(tmp_path, images):
    module = cached(tmp_path, ["counting", "pixels"])
    Counting.count = 0
    first = module(images, torch.arange(20))
    assert Counting.count == 21  # 20 images and the test image
    second = module(images, torch.arange(20))
    assert Counting.count == 22  # one drawn row a batch is compared with a live one
    third = module(images, torch.arange(20))
    without_images = module(None, torch.arange(20))
    assert Counting.count == 23  # Without images, nothing is computed.
    for name in first:
        assert torch.equal(first[name], images.flatten(1).half().float())
        for other in (second, third, without_images):
            assert torch.equal(first[name], other[name])


def test_equals_live_ones_but_for_half_precision(tmp_path, images):
    names = ["pixels", "local_std", "hog"]
    module = cached(tmp_path, names, sketch_dim=64)
    for name, y in module(images, torch.arange(20)).items():
        torch.testing.assert_close(y, module(images)[name], rtol=1e-3, atol=1e-4)


def test_partly_filled_repeated_and_shuffled(tmp_path, images):
    module = cached(tmp_path)
    for indices in ([3, 4], [4, 3, 5, 3], [19, 0], list(range(19, -1, -1))):
        rows = module(images[indices], torch.tensor(indices))
        assert torch.equal(rows["pixels"], images[indices].flatten(1).half().float())
    assert module.cache.store.is_valid().all()


def test_augmented_pixels_are_live_and_in_place(tmp_path, images):
    module = cached(tmp_path, ["pixels", "augmented_pixels", "local_std"])
    first = module(images, torch.arange(20))
    second = module(images, torch.arange(20))
    assert list(first) == ["pixels", "augmented_pixels", "local_std"]
    assert list(module.cache.store.widths) == ["pixels", "local_std"]
    assert not torch.equal(first["augmented_pixels"], second["augmented_pixels"])
    with pytest.raises(ValueError, match="augmented_pixels must be computed live"):
        module(None, torch.arange(20))
    with pytest.raises(ValueError, match="must have one that is cacheable but augmented_pixels"):
        cached(tmp_path / "n", ["augmented_pixels"])


def test_reading_without_representations(tmp_path, images):
    module = cached(tmp_path, fingerprint="f")
    written = module(images, torch.arange(20))
    reader = Representations(None, cache=tmp_path)
    assert torch.equal(reader(None, torch.tensor([3]))["pixels"], written["pixels"][3:4])
    assert torch.equal(reader(images[:2], [0, 1])["pixels"], written["pixels"][:2])
    with pytest.raises(ValueError, match="fingerprint is f there but g here"):
        Representations(None, cache={"path": tmp_path, "fingerprint": "g"})
    with pytest.raises(FileNotFoundError, match="no store"):
        Representations(None, cache=tmp_path / "none")
    partly = cached(tmp_path / "p")
    partly(images[:2], [0, 1])
    with pytest.raises(ValueError, match="without representations but lacks 1 of 2"):
        Representations(None, cache=tmp_path / "p")(images[:2], [1, 2])


def test_moves_and_saves_nothing(tmp_path, images):
    module = cached(tmp_path)
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    rows = pickle.loads(pickle.dumps(module(images, range(20))))
    assert torch.equal(module(images.half(), list(range(20)))["pixels"], rows["pixels"])


def test_image_shape_known_beforehand(tmp_path, images):
    module = cached(tmp_path, image_shape=(3, 8, 8))
    assert module.cache.store is not None
    module(images, range(20))
    again = cached(tmp_path)
    assert again.cache.store is not None  # Taken from the store.
    assert torch.equal(again(None, [1])["pixels"], images[1:2].flatten(1).half().float())
    with pytest.raises(ValueError, match="image_shape must be"):
        cached(tmp_path / "n", image_shape=(8, 8))


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["pixels"], {}, "settings.representations is"),
        ([{"name": "local_std", "window_size": 5}, "pixels"], {}, "window_size is 3 there but 5"),
        (NAMES, {"num_samples": 21}, "num_samples is 20 there but 21"),
        (NAMES, {"image_shape": (3, 9, 8)}, "is 192 there but 216|image_shape is"),
        (NAMES, {"fingerprint": "other"}, "does not say of which data set it is"),
        (NAMES, {"normalization": ([0.5], [0.5])}, r"normalization is \[\[0.485.* but \[\[0.5\], "),
        (NAMES, {"dtype": torch.float32}, "dtype is float16 there"),
        (NAMES, {"dtype": "bfloat16"}, "dtype is float16 there"),
    ],
)
def test_exception_store_of_other_settings(tmp_path, images, names, options, match):
    cached(tmp_path)(images, range(20))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=match):
        cached(tmp_path, names, **options)
    assert snapshot(tmp_path) == before


def test_exception_other_sketch(tmp_path, images):
    def sketched(seed):
        cache = {"path": tmp_path, "num_samples": 20}
        return Representations(["pixels"], sketch_dim=64, sketch_seed=seed, cache=cache)

    sketched(0)(images, range(20))
    with pytest.raises(ValueError, match="seed is 0 there but 1 here"):
        sketched(1)


def test_exception_other_computation_of_the_same_name(tmp_path, images, monkeypatch):
    cached(tmp_path, ["counting"])(images, range(20))
    monkeypatch.setattr(Counting, "extract", lambda self, images: images * 1.1)
    with pytest.raises(
        ValueError, match=r"'counting' .* was computed by something else.* differs by"
    ):
        cached(tmp_path, ["counting"])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(0),
        lambda x: x * 1.1,
        lambda x: x + 0.1,
        lambda x: x.flip(-1),
    ],
    ids=["order", "std", "mean", "augmented"],
)
def test_exception_other_images(tmp_path, images, change):
    cached(tmp_path)(images, range(20))
    with pytest.raises(ValueError, match=r"row \d+ of the store at .* is not of this image"):
        cached(tmp_path)(change(images), range(20))


@pytest.fixture(scope="module")
def photographs():
    dataset = Photographs("train", crops_per_class=2)
    images = torch.stack([to_tensor(dataset[i][0]) for i in range(20)])
    return Normalization.imagenet().apply(images)


# Those whose numbers jump where neighbours become equal, and one that is smooth.
JUMPING = ["hog", "local_std", "local_binary_patterns", "scattering"]


@pytest.mark.parametrize(
    ("dtype", "as_float", "size"),
    [(torch.bfloat16, False, 1), (torch.bfloat16, True, 20), (torch.float16, False, 20)],
)
def test_images_of_half_precision(tmp_path, photographs, dtype, as_float, size):
    cached(tmp_path, JUMPING)(photographs, range(20))
    rounded = photographs.to(dtype)
    rounded = rounded.float() if as_float else rounded

    def read(images):
        module = cached(tmp_path, JUMPING, checks_per_epoch=100)
        for _ in range(size):
            for i in range(0, 20, size):
                module(images[i : i + size], range(i, i + size))

    read(rounded)
    for other in (
        rounded.roll(1, 0),
        rounded.flip(-1),
        (photographs * 1.2).to(dtype),
        (photographs + 0.2).to(dtype),
    ):
        with pytest.raises(ValueError, match=r"is not of this image: .* and rounded alike"):
            read(other)


@pytest.mark.parametrize("kind", [int, torch.tensor, np.int64, lambda i: np.array([i])])
def test_one_index_of_a_single_image(tmp_path, images, kind):
    """As an IndexedDataset gives it."""
    module = cached(tmp_path)
    index, image = IndexedDataset(images)[3]
    for given in (image, image[None], None):
        rows = module(given, kind(index))["pixels"]
        assert torch.equal(rows, image.flatten()[None].half().float())
    assert module.cache.store.is_valid().nonzero().flatten().tolist() == [3]
    with pytest.raises(ValueError, match="same number but are 20 and 1"):
        module(images, kind(3))
    with pytest.raises(TypeError, match="indices must be integers of shape .* but are a generator"):
        module(images, (i for i in range(20)))


def test_exception_calls(tmp_path, images):
    module = cached(tmp_path)
    with pytest.raises(ValueError, match="there is no store at"):
        module(None, [0])
    module(images[:4], range(4))
    with pytest.raises(ValueError, match=r"None: 1 of 2 rows are missing .* first of them 7"):
        module(None, [3, 7])
    with pytest.raises(ValueError, match="same number but are 3 and 2"):
        module(images[:3], [0, 1])
    with pytest.raises(ValueError, match=r"must have shape \(N, 3, 8, 8\).*\(2, 3, 9, 9\)"):
        module(torch.randn(2, 3, 9, 9), [0, 1])
    with pytest.raises(ValueError, match="from 0 to 19"):
        module(images[:2], [0, 20])
    with pytest.raises(ValueError, match="finite"):
        module(torch.full((1, 3, 8, 8), torch.nan), [9])
    with pytest.raises(ValueError, match="must be told the data set that the indices count"):
        Representations(NAMES, cache=tmp_path / "n")(images, range(20))
    with pytest.raises(
        TypeError, match="cache has no option 'size'; its options are path, dataset"
    ):
        Representations(NAMES, cache={"path": tmp_path, "size": 3})
    with pytest.raises(ValueError, match=r"cache must have a path.*\['num_samples'\]"):
        Representations(NAMES, cache={"num_samples": 3})
    with pytest.raises(TypeError, match="cache must be a path, or have a path, but it is 3"):
        Representations(NAMES, cache=3)
    with pytest.raises(ValueError, match="dtype must be one of float16.* but is int8"):
        Representations(NAMES, cache={"path": tmp_path, "dtype": "int8"})
    with pytest.raises(ValueError, match="checks_per_epoch must be at least 0"):
        Representations(NAMES, cache={"path": tmp_path, "checks_per_epoch": -1})
    with pytest.raises(ValueError, match="differentiable must be False with a cache"):
        Representations(NAMES, differentiable=True, cache=tmp_path)
    with pytest.raises(ValueError, match="nothing is read without a cache"):
        Representations(NAMES)(None, [0])
    with pytest.raises(ValueError, match="indices must be given"):
        Representations(None, cache=tmp_path)(images)
    with pytest.raises(TypeError, match="list of names or a mapping"):
        Representations(None)


def test_without_indices_everything_is_computed(tmp_path, images):
    module = cached(tmp_path)
    live = Representations(NAMES)(images)
    for name, y in module(images).items():
        assert torch.equal(y, live[name])
    assert module.cache.store is None  # Nothing was stored.
    # The same call serves a training without a cache.
    assert torch.equal(Representations(NAMES)(images, range(20))["pixels"], live["pixels"])
    with pytest.raises(ValueError, match="same number but are 20 and 19"):
        Representations(NAMES)(images, range(19))


def test_what_is_not_said_is_the_stores(tmp_path, images):
    cached(tmp_path, dataset=images, num_samples=None, dtype="float32")(images, range(20))
    again = Representations(NAMES, cache=str(tmp_path))
    assert torch.equal(again(None, [3])["pixels"], images[3:4].flatten(1))
    again.open_cache(images)
    with pytest.raises(ValueError, match="fingerprint is"):
        again.open_cache(images.flip(0))


def test_exception_read_only_and_incomplete(public_folder):
    images = torch.randn(4, 3, 8, 8)
    folder = public_folder / "s"
    cached(folder, num_samples=4)(images[:2], [0, 1])
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)

    def read():
        rows = cached(folder, num_samples=4)(images[:2], [0, 1])
        raise RuntimeError(rows["pixels"].shape[0])

    assert as_nobody(read) == "RuntimeError: 2"
    message = as_nobody(lambda: cached(folder, num_samples=4)(images, range(4)))
    assert message.startswith("PermissionError")
    assert "may not be written" in message


def test_gradients_are_not_recorded(tmp_path, images):
    rows = cached(tmp_path)(images.requires_grad_(), range(20))
    assert not any(y.requires_grad for y in rows.values())


def test_compiled_caller(tmp_path, images):
    module = cached(tmp_path)
    expected = module(images, range(20))["pixels"].sum(1)
    compiled = torch.compile(lambda x, i: module(x, i)["pixels"].sum(1), backend="eager")
    torch.testing.assert_close(compiled(images, torch.arange(20)), expected)


def test_exception_some_images_replaced(tmp_path):
    images = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    module = cached(tmp_path, num_samples=400)
    module(images, range(400))
    replaced = images.clone()
    replaced[::10] = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    reader = cached(tmp_path, num_samples=400)
    reader.cache._draw.seed(0)

    def epoch():
        for start in range(0, 400, 4):
            reader(replaced[start : start + 4], range(start, start + 4))

    with pytest.raises(ValueError, match=r"row \d*0 of the store"):
        epoch()


def test_fingerprint_by_the_data_set(tmp_path, images):
    def of(dataset):
        return Representations(NAMES, cache={"path": tmp_path, "dataset": dataset})

    of(images)(images, range(20))
    of(images.clone())
    of(Subset(IndexedDataset(images), [3, 4]))  # Its indices count the whole.
    with pytest.raises(ValueError, match="fingerprint is"):
        of(images.flip(0))
    with pytest.raises(ValueError, match="num_samples is 20 there but 2 here"):
        of(images[:2])
    with pytest.raises(TypeError, match="data set with a length"):
        of(iter(images))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"path": ""}, ValueError, "cache must be the path of a folder but it is ''"),
        ({"path": "a\0b"}, ValueError, "cache must be the path of a folder"),
        ({"fingerprint": 3}, TypeError, "the cache's fingerprint must be a string but is 3"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1 but is 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an int but is a float"),
        ({"checks_per_epoch": 1.5}, TypeError, "checks_per_epoch must be an int"),
        ({"image_shape": (3, 0, 8)}, ValueError, "image_shape must be at least 1 but is 0"),
        ({"image_shape": (3, 8.0, 8)}, TypeError, "image_shape must be an int"),
        ({"image_shape": 3}, ValueError, r"image_shape must be \(C, H, W\) but is 3"),
    ],
)
def test_exception_options(tmp_path, options, error, match):
    cache = {"path": tmp_path / "s", "num_samples": 20, **options}
    with pytest.raises(error, match=f"^{match}"):
        Representations(NAMES, cache=cache)
    assert not list(tmp_path.iterdir())


def test_nothing_is_computed_that_cannot_be_stored(tmp_path, images):
    module = cached(tmp_path, ["counting"])
    module(images[:2], [0, 1])
    module.cache.store.writable = False
    Counting.count = 0
    with pytest.raises(PermissionError, match="may not be written"):
        module(images[2:4], [2, 3])
    assert Counting.count == 0


@pytest.mark.parametrize(
    ("checks_per_epoch", "sizes", "expected"),
    [
        (0, [20, 20], [0, 0]),
        (1, [10] * 6, [1, 2, 2, 3, 3, 4]),
        (2, [5] * 5, [1, 2, 2, 3, 3]),
        # One a batch: what large batches leave over is not made up for by small ones.
        (10, [20, 1, 1, 1], [1, 2, 3, 3]),
        (64, [20, 20], [1, 2]),
    ],
)
def test_how_often_rows_are_compared(tmp_path, images, checks_per_epoch, sizes, expected):
    cached(tmp_path, ["counting"])(images, range(20))
    reader = cached(tmp_path, ["counting"], checks_per_epoch=checks_per_epoch)
    Counting.count, counts = 0, []
    for size in sizes:
        reader(images[:size], range(size))
        counts.append(Counting.count)
    assert counts == expected


def test_rows_that_are_just_computed_are_not_compared(tmp_path, images):
    module = cached(tmp_path, ["counting"])
    module(images[:4], range(4))
    Counting.count = 0
    module(images[4:10], range(4, 10))
    assert Counting.count == 6
    module(images[9:12], range(9, 12))  # two new ones, and the one that is there
    assert Counting.count == 6 + 2 + 1


def test_what_is_stored_exactly_differs_by_nothing(tmp_path, images, monkeypatch):
    monkeypatch.setattr("mvmr_loss.cache.rows._TOLERANCE", 0.0)
    cached(tmp_path, ["pixels"], dtype="float32")(images, range(20))
    rows = cached(tmp_path, ["pixels"], dtype="float32")(images, range(20))
    assert torch.equal(rows["pixels"], images.flatten(1))


def test_the_test_image_is_that_of_stores_made_before():
    """Of another one, the store's representations would be others."""
    expected = [
        *(0.50000, 0.42719, 0.44597, 0.57668, 0.62744, 0.54532, 0.48313, 0.52178),
        *(0.70637, 0.67740, 0.58550, 0.53295, 0.59562, 0.49250, 0.76692, 0.86323),
        *(0.74771, 0.55330, 0.70168, 0.93593, 0.84920, 0.67601, 0.64740, 0.92508),
    ]
    image = _test_image(2, 3, 4)
    assert image.shape == (1, 2, 3, 4)
    torch.testing.assert_close(image.flatten(), torch.tensor(expected), rtol=0, atol=1e-5)
    large = _test_image(3, 40, 50)
    assert large[0, 2, 39, 49].item() == pytest.approx(0.55172, abs=1e-4)
    assert 0 <= large.min() < 0.05
    assert 0.95 < large.max() <= 1


def test_printing(tmp_path):
    assert f"cache={str(tmp_path)!r}" in repr(cached(tmp_path))


@pytest.mark.parametrize("level", [0, 102, 255])
@pytest.mark.parametrize("window_size", [3, 7])
def test_a_blank_image_is_what_it_was(tmp_path, images, level, window_size):
    blank = torch.full_like(images[:1], (level / 255 - 0.456) / 0.224)
    names = ["pixels", {"name": "local_std", "window_size": window_size}]
    module = cached(tmp_path, names, checks_per_epoch=1000)
    for _ in range(3):
        found = module(blank, torch.tensor([4]))
    assert found["local_std"].abs().max() == 0


def test_tiny_features_are_compared_as_they_are_stored(tmp_path, images):
    module = cached(tmp_path, ["pixels"], checks_per_epoch=1000, normalization="none")
    for _ in range(3):
        found = module(1e-7 * images[:4], torch.arange(4))
    assert found["pixels"].abs().max() < 1e-6


class Offset(Representation):
    """Features that differ by little beside what they have in common."""

    def extract(self, images):
        return 1013 + images

    def output_shape(self, channels, height, width):
        return channels, height, width


def test_differences_that_would_be_rounded_off_are_refused(tmp_path, images):
    offset = {"offset": Offset()}
    with pytest.raises(ValueError, match="rounds them off for 'offset'.*dtype='float32'"):
        cached(tmp_path / "half", offset)(images, torch.arange(20))
    found = cached(tmp_path / "single", offset, dtype="float32")(images, torch.arange(20))
    torch.testing.assert_close(found["offset"], (1013 + images).flatten(1))
    same = cached(tmp_path / "same", offset)(images[:2], torch.arange(2))  # too few to tell
    assert same["offset"].shape == (2, 192)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_differences_are_looked_at_in_small_batches(tmp_path, images, size):
    def read(name, representation):
        module = cached(tmp_path / name, {name: representation})
        for i in range(0, 20, size):
            module(images[i : i + size], range(20)[i : i + size])
        return module.cache.store

    with pytest.raises(ValueError, match="rounds them off for 'offset'"):
        read("offset", Offset())
    assert read("pixels", Pixels()).is_valid().all()


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_blank_images_do_not_tell_the_differences(tmp_path, images, level):
    images[:10] = (level - 0.456) / 0.224  # As empty tiles of a satellite, in one folder.
    names = ["pixels", "scattering", "hog"]
    rows = cached(tmp_path / "a", names)(images[:10], range(10))
    assert rows["pixels"].std(dim=0).max() == 0
    module = cached(tmp_path / "b", {**dict.fromkeys(names), "offset": Offset()})
    module(images[:10], range(10))
    with pytest.raises(ValueError, match="rounds them off for 'offset'"):
        module(images[10:12], [10, 11])


class Common(Representation):
    """Features with much in common beside what images differ by."""

    common = 50.0

    def extract(self, images):
        return self.common + images.mean(dim=(2, 3))

    def output_shape(self, channels, height, width):
        return (channels,)


@pytest.mark.parametrize("order", [range(20), [*range(10), *range(10)]])
def test_rows_are_compared_by_what_images_differ_by(tmp_path, images, order):
    """All images' features are nearly the same, measured by their length."""
    options = {"dtype": "float32", "checks_per_epoch": 1000}
    found = cached(tmp_path, {"common": Common()}, **options)(images, range(20))["common"]
    assert (found - found.roll(1, 0)).norm() < 0.01 * found.norm()
    indices, chosen = torch.tensor(order), images[torch.tensor(order)]
    cached(tmp_path, {"common": Common()}, **options)(chosen, indices)
    with pytest.raises(ValueError, match=r"not of this image: .* differs by \d+% of what images"):
        cached(tmp_path, {"common": Common()}, **options)(chosen.roll(1, 0), indices)


@pytest.mark.parametrize("indices", [range(7), [0] * 20])
def test_of_few_images_it_is_not_known_what_they_differ_by(tmp_path, images, indices):
    options = {"dtype": "float32", "checks_per_epoch": 1000}
    cached(tmp_path, {"common": Common()}, **options)(images, range(20))
    reader = cached(tmp_path, {"common": Common()}, **options)
    for _ in range(3):
        reader(images[: len(indices)].flip(0), indices)


def test_noise_is_not_what_images_differ_by(tmp_path, images, monkeypatch):
    """Where features of all images are the same up to rounding, so are those read and computed."""
    monkeypatch.setattr(Common, "common", 1e5)
    options = {"dtype": "float32", "checks_per_epoch": 1000}
    cached(tmp_path, {"common": Common()}, **options)(images, range(20))
    cached(tmp_path, {"common": Common()}, **options)(images.roll(1, 0), range(20))


def test_a_store_of_features_that_are_there_already(tmp_path, images):
    """As docs/cache.md writes one."""
    features = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    for folder, settings in (("a", {"fingerprint": dataset_fingerprint(images)}), ("b", None)):
        store = RepresentationCache.create(tmp_path / folder, {"teacher": 7}, 20, settings=settings)
        store.write(range(20), {"teacher": features})
        rows = Representations(None, cache=tmp_path / folder)(None, [3, 7])["teacher"]
        assert torch.equal(rows, features[[3, 7]].half().float())
    cache = {"path": tmp_path / "a", "dataset": images}
    assert Representations(None, cache=cache)(images[:2], [0, 1])["teacher"].shape == (2, 7)
    with pytest.raises(
        ValueError, match=r"settings=\{'fingerprint': dataset_fingerprint\(dataset\)\}"
    ):
        Representations(None, cache={"path": tmp_path / "b", "dataset": images})
    with pytest.raises(ValueError, match="fingerprint is"):
        Representations(None, cache={**cache, "dataset": images.flip(0)})


def build():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize("sketch_dim", [None, 3])
def test_device_and_folder_of_a_teacher_make_no_other_store(
    tmp_path, images, monkeypatch, sketch_dim
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(build().state_dict(), tmp_path / name)

    def read(weights, label="device", **options):
        options |= {"name": "teacher", "source": "checkpoint", "model": f"{__name__}:build"}
        teacher = {label: {**options, "weights": weights}}
        return cached(tmp_path / "s", teacher, sketch_dim=sketch_dim)(images, range(20))[label]

    rows = read(tmp_path / "a.pt", device="cpu")
    for weights in ("a.pt", "~/a.pt", "../" + tmp_path.name + "/a.pt"):
        assert torch.equal(read(weights), rows)
    with pytest.raises(ValueError, match=r"weights is .*/a.pt there but b.pt here"):
        read("b.pt")
    with pytest.raises(ValueError, match=r"l2_normalize is False there but True here"):
        read("a.pt", l2_normalize=True)
    torch.save(build().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"was computed by something else"):
        read("a.pt")


def test_a_folder_at_home(tmp_path, images, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cached("~/features")(images, torch.arange(20))
    assert (tmp_path / "features" / "metadata.json").exists()
    store = RepresentationCache("~/features")
    assert store.path == tmp_path / "features"
    assert bool(store.is_valid().all())

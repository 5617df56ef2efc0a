from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset

from mvmr_loss import Representations, register_representation
from mvmr_loss.representations import Representation
from mvmr_loss.representations import cache as cache_module
from mvmr_loss.representations.cache import (
    CachedRepresentations,
    CorruptCacheError,
    IndexedDataset,
    RepresentationCache,
    dataset_fingerprint,
    fill,
    main,
)

ROOT = Path(__file__).parents[2]
NAMES = ["pixels", "local_std"]


@register_representation("counting")
class Counting(Representation):
    """Pixels, counting the images it is computed for."""

    count = 0

    def extract(self, images):
        Counting.count += len(images)
        return images

    def output_shape(self, channels, height, width):
        return (channels, height, width)


@pytest.fixture
def images():
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def features(indices, width=5):
    """Rows that are a function of their index."""
    return {"a": torch.stack([torch.arange(width) + 10.0 * i for i in indices])}


def cached(path, names=NAMES, **options):
    return CachedRepresentations(Representations(names), path, **{"num_samples": 20, **options})


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the store


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
        with pytest.raises(ValueError, match=r"widths must|num_samples must|dtype must"):
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


# --- damage


def damaged_store(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    store.write(range(6), features(range(6)))
    return tmp_path


@pytest.mark.parametrize("file", ["rows.bin", "index.bin"])
@pytest.mark.parametrize("change", [-1, 1])
def test_exception_wrong_size(tmp_path, file, change):
    folder = damaged_store(tmp_path)
    opened = RepresentationCache(folder)
    os.truncate(folder / file, (folder / file).stat().st_size + change)
    with pytest.raises(CorruptCacheError, match=rf"{file} must have \d+ bytes but has"):
        RepresentationCache(folder)
    # A store that is open already must not read beyond the end of the file, which would kill it.
    with pytest.raises(CorruptCacheError, match="truncated"):
        opened.read([5])


def test_every_flipped_bit_of_a_row_is_found(tmp_path):
    folder = damaged_store(tmp_path)
    data = bytearray((folder / "rows.bin").read_bytes())
    for bit in range(3 * 80, 4 * 80):  # row 3: 5 numbers of 16 bits
        data[bit // 8] ^= 1 << bit % 8
        (folder / "rows.bin").write_bytes(data)
        with pytest.raises(CorruptCacheError, match=r"row 3 .* does not match its checksum"):
            RepresentationCache(folder).read([2, 3])
        data[bit // 8] ^= 1 << bit % 8
    (folder / "rows.bin").write_bytes(data)
    assert RepresentationCache(folder).verify() == []


def test_every_flipped_bit_of_an_entry_is_found(tmp_path):
    folder = damaged_store(tmp_path)
    data = bytearray((folder / "index.bin").read_bytes())
    for bit in range(3 * 64, 4 * 64):
        data[bit // 8] ^= 1 << bit % 8
        (folder / "index.bin").write_bytes(data)
        assert RepresentationCache(folder).verify() == [3]
        data[bit // 8] ^= 1 << bit % 8


def test_swapped_and_zeroed_rows_are_found(tmp_path):
    folder = damaged_store(tmp_path)
    rows, index = (folder / "rows.bin").read_bytes(), (folder / "index.bin").read_bytes()
    # Rows 0 and 1 change places, together with their checksums.
    (folder / "rows.bin").write_bytes(rows[10:20] + rows[:10] + rows[20:])
    (folder / "index.bin").write_bytes(index[8:16] + index[:8] + index[16:])
    assert RepresentationCache(folder).verify() == [0, 1]
    (folder / "rows.bin").write_bytes(bytes(len(rows)))
    (folder / "index.bin").write_bytes(index)
    assert RepresentationCache(folder).verify() == list(range(6))


def test_repair(tmp_path):
    folder = damaged_store(tmp_path)
    with open(folder / "rows.bin", "r+b") as file:
        file.seek(23)
        file.write(b"x")
    store = RepresentationCache(folder)
    assert store.verify(repair=True) == [2]
    assert store.is_valid().tolist() == [True, True, False, True, True, True]
    store.write([2], features([2]))
    assert torch.equal(store.read(range(6))["a"], features(range(6))["a"])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "\x00" * 100])
def test_exception_damaged_metadata(tmp_path, content):
    folder = damaged_store(tmp_path)
    (folder / "metadata.json").write_text(content)
    with pytest.raises(CorruptCacheError, match=r"metadata\.json is damaged"):
        RepresentationCache(folder)


def test_exception_changed_metadata(tmp_path):
    folder = damaged_store(tmp_path)
    original = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text(original.replace('"a": 5', '"b": 5'))
    with pytest.raises(CorruptCacheError, match="damaged"):
        RepresentationCache(folder)
    for key, value, match in (("format", 9, "format 9"), ("byteorder", "big", "endian")):
        content = json.loads(original)
        content[key] = value
        del content["checksum"]
        content["checksum"] = cache_module._json_checksum(content)
        (folder / "metadata.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            RepresentationCache(folder)


@pytest.mark.parametrize("file", ["rows.bin", "index.bin"])
def test_exception_lost_file(tmp_path, file):
    folder = damaged_store(tmp_path)
    (folder / file).unlink()
    with pytest.raises(CorruptCacheError, match=f"has no {file}"):
        RepresentationCache(folder)


def test_half_created_store_is_created_anew(tmp_path):
    damaged_store(tmp_path)
    (tmp_path / "metadata.json").rename(tmp_path / "metadata.json.new")
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    assert not store.is_valid().any()


# --- full disk, read-only folder


def test_exception_disk_too_small(tmp_path):
    huge = shutil.disk_usage(tmp_path).total
    with pytest.raises(OSError, match=r"needs .* GB but the disk has only .* GB free") as caught:
        RepresentationCache.create(tmp_path / "s", {"a": 512}, huge // 1024)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "s" / "rows.bin").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_exception_disk_full_while_reserving(tmp_path, monkeypatch, code):
    def no_space(*arguments):
        raise OSError(code, "no space")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OSError, match="free some, use another disk"):
        RepresentationCache.create(tmp_path, {"a": 5}, 6)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lock"]
    RepresentationCache.create(tmp_path, {"a": 5}, 6)


def test_exception_disk_full_while_writing(tmp_path, monkeypatch):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    calls, pwrite = [], os.pwrite

    def fails_on_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", fails_on_the_third)
    with pytest.raises(OSError, match=r"could not be written .No space left on device"):
        store.write(range(6), features(range(6)))
    assert not store.is_valid().any()
    store.write(range(6), features(range(6)))
    assert torch.equal(store.read(range(6))["a"], features(range(6))["a"])


def as_nobody(function):
    """Runs a function in a child process without root's rights, and returns what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork.
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            function()
            message = "nothing was raised"
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        message = file.read()
    os.waitpid(child, 0)
    return message


@pytest.fixture
def public_folder():
    """A folder that all users may enter, which pytest's own are not."""
    folder = Path("/tmp") / f"mvmr-cache-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(mode=0o755)
    yield folder
    for file in [folder, *folder.rglob("*")]:
        file.chmod(0o755)
    shutil.rmtree(folder)


def test_read_only_folder(public_folder):
    folder = damaged_store(public_folder / "s")
    os.truncate(folder / "lock", 0)
    with open(folder / "index.bin", "r+b") as file:
        file.write(bytes(8))  # Row 0 is missing.
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)

    def read():
        store = RepresentationCache(folder)
        rows = store.read([1, 5])
        raise RuntimeError(torch.equal(rows["a"], features([1, 5])["a"]))

    def write():
        RepresentationCache(folder).write([0], features([0]))

    def create():
        RepresentationCache.create(folder / "new", {"a": 5}, 6)

    assert as_nobody(read) == "RuntimeError: True"
    assert as_nobody(write).startswith("PermissionError")
    assert "may not be written; change its permissions" in as_nobody(write)
    assert "cannot be created because the folder may not be written" in as_nobody(create)


# --- killed and concurrent processes

WRITER = """
import sys, torch
from mvmr_loss.representations.cache import RepresentationCache
folder, seed = sys.argv[1], int(sys.argv[2])
store = RepresentationCache.create(folder, {"a": 300}, 400)
print("ready", flush=True)
order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
for indices in order.split(8):
    new = indices[~store.is_valid(indices)]
    if len(new):
        store.write(new, {"a": torch.arange(300) % 7 + new[:, None].float()})
print("done", flush=True)
"""


def start_writer(folder, seed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seed)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def check_rows(folder):
    """Every row that is valid has the right numbers; returns how many are valid."""
    store = RepresentationCache(folder)
    assert store.verify() == []
    valid = store.is_valid().nonzero().flatten()
    if len(valid):
        expected = torch.arange(300) % 7 + valid[:, None].float()
        assert torch.equal(store.read(valid)["a"], expected)
    return len(valid)


def test_two_processes_fill_one_store(tmp_path):
    writers = [start_writer(tmp_path, seed) for seed in (1, 2)]
    assert [writer.communicate()[0].split() for writer in writers] == [["ready", "done"]] * 2
    assert check_rows(tmp_path) == 400


def kill_forks(folder, count, seed):
    """Kills writers at random moments; returns how many rows were valid after each."""
    draw, valid = random.Random(seed), []
    for i in range(count):
        child = os.fork()
        if child == 0:
            try:
                store = RepresentationCache.create(folder, {"a": 300}, 400)
                order = torch.randperm(400, generator=torch.Generator().manual_seed(i))
                for indices in order.split(8):
                    new = indices[~store.is_valid(indices)]
                    if len(new):
                        store.write(new, {"a": torch.arange(300) % 7 + new[:, None].float()})
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (folder / "metadata.json").exists():
            valid.append(check_rows(folder))
    return valid


def test_killed_at_random_moments(tmp_path):
    valid = kill_forks(tmp_path / "s", 60, seed=0)
    assert valid == sorted(valid)  # No row that was there is ever lost.
    assert sum(0 < n < 400 for n in valid) > 0  # Killed in the middle, really.
    writer = start_writer(tmp_path / "s", 0)
    assert writer.communicate()[0].split() == ["ready", "done"]
    assert check_rows(tmp_path / "s") == 400


@pytest.mark.slow
def test_killed_at_random_moments_many_times(tmp_path):
    middle = 0
    for seed in range(12):
        valid = kill_forks(tmp_path / str(seed), 60, seed)
        assert valid == sorted(valid)
        middle += sum(0 < n < 400 for n in valid)
    assert middle > 60


# --- cached representations


def test_second_epoch_computes_nothing(tmp_path, images):
    module = cached(tmp_path, ["counting", "pixels"])
    Counting.count = 0
    first = module(images, torch.arange(20))
    assert Counting.count == 21  # 20 images and the test image
    second = module(images, torch.arange(20))
    assert Counting.count == 22  # the comparison of one row with a live one
    third = module(images, torch.arange(20))
    without_images = module(None, torch.arange(20))
    assert Counting.count == 22
    for name in first:
        assert torch.equal(first[name], images.flatten(1).half().float())
        for other in (second, third, without_images):
            assert torch.equal(first[name], other[name])


def test_equals_live_ones_but_for_half_precision(tmp_path, images):
    names = ["pixels", "local_std", "hog"]
    representations = Representations(names, sketch_dim=64)
    module = CachedRepresentations(representations, tmp_path, num_samples=20)
    for name, y in module(images, torch.arange(20)).items():
        torch.testing.assert_close(y, representations(images)[name], rtol=1e-3, atol=1e-4)


def test_partly_filled_repeated_and_shuffled(tmp_path, images):
    module = cached(tmp_path)
    for indices in ([3, 4], [4, 3, 5, 3], [19, 0], list(range(19, -1, -1))):
        rows = module(images[indices], torch.tensor(indices))
        assert torch.equal(rows["pixels"], images[indices].flatten(1).half().float())
    assert module.cache.is_valid().all()


def test_augmented_pixels_are_live_and_in_place(tmp_path, images):
    module = cached(tmp_path, ["pixels", "augmented_pixels", "local_std"])
    first = module(images, torch.arange(20))
    second = module(images, torch.arange(20))
    assert list(first) == ["pixels", "augmented_pixels", "local_std"]
    assert list(module.cache.widths) == ["pixels", "local_std"]
    assert not torch.equal(first["augmented_pixels"], second["augmented_pixels"])
    with pytest.raises(ValueError, match="augmented_pixels must be computed live"):
        module(None, torch.arange(20))
    with pytest.raises(ValueError, match="must have one that is cacheable but augmented_pixels"):
        cached(tmp_path / "n", ["augmented_pixels"])


def test_reading_without_representations(tmp_path, images):
    module = cached(tmp_path, fingerprint="f")
    written = module(images, torch.arange(20))
    reader = CachedRepresentations(None, tmp_path)
    assert torch.equal(reader(None, torch.tensor([3]))["pixels"], written["pixels"][3:4])
    assert torch.equal(reader(images[:2], [0, 1])["pixels"], written["pixels"][:2])
    with pytest.raises(ValueError, match="fingerprint is f there but g here"):
        CachedRepresentations(None, tmp_path, fingerprint="g")
    with pytest.raises(FileNotFoundError, match="no store"):
        CachedRepresentations(None, tmp_path / "none")
    partly = cached(tmp_path / "p")
    partly(images[:2], [0, 1])
    with pytest.raises(ValueError, match="without representations but lacks 1 of 2"):
        CachedRepresentations(None, tmp_path / "p")(images[:2], [1, 2])


def test_moves_and_saves_nothing(tmp_path, images):
    module = cached(tmp_path)
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    rows = pickle.loads(pickle.dumps(module(images, range(20))))
    assert torch.equal(module(images.half(), list(range(20)))["pixels"], rows["pixels"])


def test_image_shape_known_beforehand(tmp_path, images):
    module = cached(tmp_path, image_shape=(3, 8, 8))
    assert module.cache is not None
    module(images, range(20))
    again = cached(tmp_path)
    assert again.cache is not None  # Taken from the store.
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
        (NAMES, {"fingerprint": "other"}, "fingerprint is None there but other"),
        (NAMES, {"normalization": ([0.5], [0.5])}, "normalization is None there"),
        (NAMES, {"dtype": torch.float32}, "dtype is float16 there"),
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
        representations = Representations(["pixels"], sketch_dim=64, sketch_seed=seed)
        return CachedRepresentations(representations, tmp_path, num_samples=20)

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
    with pytest.raises(ValueError, match=r"row 0 of the store at .* is not of this image"):
        cached(tmp_path)(change(images), range(20))


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
    with pytest.raises(TypeError, match="representations must be"):
        CachedRepresentations(NAMES, tmp_path, num_samples=20)
    with pytest.raises(ValueError, match="num_samples must be given"):
        CachedRepresentations(Representations(NAMES), tmp_path)


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


# --- data sets


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
    module = cached(tmp_path)
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
    with pytest.raises(ValueError, match="store's 20 samples but has 19"):
        fill(module, images[:19])


@pytest.fixture
def image_folder(tmp_path):
    from benchmarks.common.photographs import Photographs

    dataset = Photographs("train", crops_per_class=2)
    folder = tmp_path / "images"
    for i in range(12):
        image, label = dataset[i]
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        image.resize((40, 32)).save(folder / f"class{label}" / f"{i}.png")
    return folder


class PlainDataset(torch.utils.data.Dataset):
    """A user's own: no attributes that say what is in it."""

    def __init__(self, images):
        self.pictures = images

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index]


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


# --- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mvmr_loss.representations.cache", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command(image_folder, tmp_path, capsys):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    arguments = [
        *("fill", tmp_path / "s", "--data", image_folder, "--image-size", 32, "--sketch-dim", 512),
        *("--representations", "pixels", '{"name": "local_std", "window_size": 5}'),
    ]
    done = command(*arguments, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "12/12" in done.stderr
    assert "Traceback" not in done.stderr
    # What a training of one's own reads there.
    dataset = ImageFolder(
        image_folder,
        v2.Compose(
            [
                v2.Resize(32),
                v2.CenterCrop(32),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        ),
    )
    names = ["pixels", {"name": "local_std", "window_size": 5}]
    representations = Representations(names, sketch_dim=512)
    module = CachedRepresentations(
        representations,
        tmp_path / "s",
        num_samples=12,
        fingerprint=dataset_fingerprint(dataset),
        normalization=([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    )
    x = torch.stack([image for image, _ in dataset])
    for name, y in module(x, range(12)).items():
        torch.testing.assert_close(y, representations(x)[name], rtol=2e-3, atol=2e-3)

    main(["info", str(tmp_path / "s")])
    assert "12 of 12 rows" in capsys.readouterr().out
    main(["verify", str(tmp_path / "s")])
    assert "12 of 12 rows are there and whole" in capsys.readouterr().out
    with open(tmp_path / "s" / "rows.bin", "r+b") as file:
        file.seek(5)
        file.write(b"damaged")
    with pytest.raises(SystemExit, match="1 rows are damaged, the first of them 0"):
        main(["verify", str(tmp_path / "s")])
    main(["verify", "--repair", str(tmp_path / "s")])
    assert "11 of 12 rows are there" in capsys.readouterr().out
    assert command(*arguments).returncode == 0
    main(["verify", str(tmp_path / "s")])
    assert "12 of 12 rows are there and whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["fill", "s", "--data", "nowhere", "--image-size", "32"], "--data must be a folder"),
        (["fill", "s", "--data", "CIFAR10", "--image-size", "32"], "CIFAR10 cannot be read in"),
        (["info", "nowhere"], "there is no store at nowhere"),
        (["verify", "nowhere"], "there is no store at nowhere"),
    ],
)
def test_exception_command(arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"Error: .*{match}"):
        main(arguments)


def test_exception_command_representations(image_folder, tmp_path):
    arguments = ["fill", str(tmp_path / "s"), "--data", str(image_folder), "--image-size", "32"]
    with pytest.raises(SystemExit, match="representation must be one of"):
        main([*arguments, "--representations", "pixel"])
    with pytest.raises(SystemExit, match="must be names or JSON"):
        main([*arguments, "--representations", "{pixel"])

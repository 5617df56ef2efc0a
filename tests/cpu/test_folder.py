"""What is kept of the kernels on disk, and that nothing else is ever loaded."""

import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from mvmr_loss import MVMRLoss
from mvmr_loss._cpu import build, folder

LOAD = build._load.__wrapped__
CACHE, TEMPORARY = Path("cache/mvmr-loss/native"), Path(f"temporary/mvmr-loss-{os.geteuid()}")

pytestmark = pytest.mark.usefixtures("kernels_on")


def libraries(fresh):
    return sorted(path for path in fresh.rglob("sketch_*.so"))


def is_on(name="sketch"):
    library, reason = LOAD(name)
    assert (library is None) == bool(reason)
    return library is not None


@pytest.fixture
def kept(fresh, compiler):
    """A library that an earlier process has compiled."""
    assert is_on()
    (library,) = libraries(fresh)
    assert len(compiler.calls) == 1
    return library


@pytest.fixture
def trap(fresh, compiled):
    """A library, and the file that its constructor writes when it is loaded."""
    mark = fresh / "loaded"
    library = compiled(
        "#include <cstdio>\n#include <cstdlib>\n"
        "__attribute__((constructor)) static void spring() {"
        ' if (const char* path = std::getenv("TRAP")) std::fclose(std::fopen(path, "w")); }'
    )
    os.environ["TRAP"] = str(mark)
    yield library.read_bytes(), mark
    del os.environ["TRAP"]


def put(library, kept, folder=None):
    """Writes a foreign library under a name that is right but for whose it is."""
    prefix = kept.name.removesuffix(".so")[:-64]
    path = (folder or kept.parent) / f"{prefix}{hashlib.sha256(library).hexdigest()}.so"
    path.write_bytes(library)
    kept.unlink()
    return path


def test_is_compiled_once_and_kept_in_private(fresh, compiler, kept):
    assert kept.parent == fresh / CACHE
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert is_on()
    assert len(compiler.calls) == 1
    assert sorted(path.name for path in kept.parent.iterdir()) == ["lock", kept.name]


@pytest.mark.parametrize("mask", [0, 0o002, 0o077])
def test_whatever_the_umask(fresh, compiler, mask):
    before = os.umask(mask)
    try:
        assert is_on()
    finally:
        os.umask(before)
    assert all(not path.stat().st_mode & 0o022 for path in (fresh / CACHE).rglob("*"))
    assert is_on()
    assert len(compiler.calls) == 1


@pytest.mark.parametrize(
    "damage", ["empty", "half", "garbage", "one bit", "longer", "folder", "link"]
)
def test_what_is_not_whole_is_built_anew(fresh, compiler, kept, damage):
    whole = kept.read_bytes()
    contents = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "garbage": os.urandom(len(whole)),
        "one bit": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "longer": whole + b"\0",
    }
    kept.unlink()  # and not written over: this process has it open
    if damage in contents:
        kept.write_bytes(contents[damage])
    elif damage == "folder":
        kept.mkdir()
    else:
        kept.symlink_to(compiler.library)
    assert is_on()
    assert len(compiler.calls) == 2
    made = [path for path in libraries(fresh) if path.is_file() and not path.is_symlink()]
    assert [path.read_bytes() for path in made] == [whole]
    assert is_on()
    assert len(compiler.calls) == 2


@pytest.mark.parametrize("kept_by", ["this process", "an earlier one"])
def test_a_library_without_our_functions_is_told_and_done_without(
    fresh, compiler, kept_by, monkeypatch, caplog
):
    """Its digest is right: it was compiled so, by whatever CXX names."""
    if kept_by == "an earlier one":
        LOAD("gram")
    library, reason = LOAD("gram")  # The compiler gives that of sketch, whatever its source.
    assert library is None
    assert f"what {compiler.path} -std=c++17" in reason
    assert "made of gram.cpp has not its functions: " in reason
    assert "undefined symbol: centered_gram" in reason or sys.platform != "linux"
    assert [status.on for status in build.kernels()] == [False, False, True]
    x = torch.randn(12, 40)
    assert torch.isfinite(MVMRLoss()(x, x + torch.randn(12, 40), {"y": x}))
    told = [record.getMessage() for record in caplog.records if "'gram'" in record.getMessage()]
    assert len(told) == 1
    assert reason in told[0]
    build.load_library.cache_clear()
    monkeypatch.setenv("MVMR_LOSS_NATIVE", "required")
    with pytest.raises(RuntimeError, match=r"the kernel 'gram' cannot be used: what .* has not"):
        build.load_library("gram")


def test_what_a_killed_process_left_is_taken_away(fresh, compiler, kept):
    (kept.parent / f"{kept.name[:24]}0123.part").write_bytes(b"half")
    kept.unlink()
    kept.write_bytes(b"")
    assert is_on()
    assert sorted(path.name for path in kept.parent.iterdir()) == ["lock", kept.name]


def test_the_trap_works(compiled, trap):
    """Else no test below could fail."""
    library, mark = trap
    path = mark.parent / "trap.so"
    path.write_bytes(library)
    build.ctypes.CDLL(str(path))
    assert mark.exists()


@pytest.fixture
def other_owner(monkeypatch):
    """Returns what gives a file to another user, or makes it look so where only root could."""
    if os.geteuid() == 0:
        return lambda path: os.chown(path, 12345, 12345)
    inodes, fstat = set(), os.fstat

    def told(descriptor):
        found = list(fstat(descriptor))
        if found[1] in inodes:
            found[4] = 12345
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", told)
    return lambda path: inodes.add(path.stat().st_ino)


@pytest.mark.parametrize("fault", ["file of another", "writable file"])
def test_a_foreign_file_is_not_loaded(fresh, compiler, kept, trap, other_owner, fault):
    library, mark = trap
    path = put(library, kept)
    other_owner(path) if fault == "file of another" else path.chmod(0o722)
    assert is_on()
    assert not mark.exists()
    assert libraries(fresh) == [kept]
    assert len(compiler.calls) == 2


def test_a_link_to_a_foreign_file_is_not_followed(fresh, compiler, kept, trap):
    library, mark = trap
    path = put(library, kept)
    path.symlink_to(path.rename(fresh / "elsewhere"))
    assert is_on()
    assert not mark.exists()
    assert libraries(fresh) == [kept]


@pytest.mark.parametrize("fault", ["folder of another", "for all", "for the group", "link"])
def test_a_folder_that_others_can_write_to_is_not_used(
    fresh, compiler, kept, trap, other_owner, fault
):
    library, mark = trap
    path = put(library, kept)
    if fault == "folder of another":
        other_owner(path.parent)
    elif fault == "link":
        path.parent.symlink_to(path.parent.rename(fresh / "elsewhere"))
    else:
        path.parent.chmod(0o777 if fault == "for all" else 0o775)
    assert is_on()
    assert not mark.exists()
    assert (fresh / TEMPORARY / kept.name).is_file()
    assert (fresh / TEMPORARY).stat().st_mode & 0o777 == 0o700
    # Nor is the second folder, and then the kernel is off, with both reasons.
    (fresh / TEMPORARY).chmod(0o777)
    library, reason = LOAD("sketch")
    assert library is None
    assert str(fresh / CACHE) in reason
    assert f"{fresh / TEMPORARY}: others own it or can write to it" in reason


def test_a_folder_put_in_place_of_the_checked_one_is_not_looked_at(
    fresh, compiler, kept, trap, monkeypatch
):
    """Who can write to the folder above can do that at any time, however short."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("folders are opened by their names here")
    library, mark = trap
    find = folder._find

    def find_and_swap(*arguments):
        found = find(*arguments)
        kept.parent.rename(fresh / "moved")
        kept.parent.mkdir()
        (kept.parent / kept.name).write_bytes(library)
        return found

    monkeypatch.setattr(folder, "_find", find_and_swap)
    assert is_on()
    assert not mark.exists()


@pytest.mark.parametrize("cache", ["file", "nowhere", "relative", "no home"])
def test_a_cache_that_cannot_be_written_to(fresh, compiler, cache, monkeypatch):
    if cache == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        (fresh / "file").touch()
        place = {"file": str(fresh / "file"), "nowhere": "/proc/nowhere", "relative": "here"}[cache]
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        monkeypatch.setenv("HOME", str(fresh / "file"))
    assert is_on()
    assert [path.parent for path in libraries(fresh)] == [fresh / TEMPORARY]
    assert is_on()
    assert len(compiler.calls) == 1


@pytest.mark.parametrize("failing", ["lock", "write", "replace"])
def test_a_read_only_or_full_cache(fresh, compiler, failing, monkeypatch):
    call, full = (os.replace if failing == "replace" else os.open), (fresh / CACHE)

    def fail(path, *arguments, **options):
        descriptor = options.get("dir_fd", options.get("dst_dir_fd"))
        named = failing == "replace" or (
            str(path) == "lock" if failing == "lock" else str(path).endswith(".part")
        )
        if named and os.path.samestat(os.fstat(descriptor), full.stat()):
            raise OSError(errno.EROFS, "Read-only file system")
        return call(path, *arguments, **options)

    monkeypatch.setattr(os, "replace" if failing == "replace" else "open", fail)
    assert is_on()
    assert [path.parent for path in libraries(fresh)] == [fresh / TEMPORARY]


def test_a_whole_library_is_loaded_from_a_read_only_cache(fresh, compiler, kept, monkeypatch):
    monkeypatch.setattr(folder, "_locked", lambda folder: pytest.fail("it writes"))
    assert is_on()
    assert len(compiler.calls) == 1


def in_a_process(barrier, results):
    barrier.wait()
    results.put((LOAD("sketch")[1], tempfile.gettempdir()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_eight_processes_at_once_compile_once(fresh, compiler):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [
        context.Process(target=in_a_process, args=(barrier, results), daemon=True) for _ in range(8)
    ]
    for process in processes:
        process.start()
    reasons = [results.get(timeout=60)[0] for _ in processes]
    for process in processes:
        process.join(60)
    assert reasons == [""] * 8
    assert len(compiler.calls) == 1
    assert len(libraries(fresh)) == 1


def test_eight_threads_at_once_compile_once(fresh, compiler):
    reasons = []
    threads = [threading.Thread(target=lambda: reasons.append(LOAD("sketch")[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert reasons == [""] * 8
    assert len(compiler.calls) == 1


@pytest.mark.parametrize("locks", ["none", "refused"])
def test_without_locks_a_library_is_whole_all_the_same(fresh, compiler, monkeypatch, locks):
    if locks == "none":
        monkeypatch.setattr(folder, "fcntl", None)
    else:
        refused = OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(
            folder.fcntl, "flock", lambda *_: (_ for _ in ()).throw(refused), raising=True
        )
    reasons = []
    threads = [threading.Thread(target=lambda: reasons.append(LOAD("sketch")[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert reasons == [""] * 4
    assert 1 <= len(compiler.calls) <= 4
    assert len(libraries(fresh)) == 1


def test_without_a_lock_what_another_writes_or_loads_stays(fresh, kept):
    other = kept.with_name(f"{kept.name[:24]}0123.part")
    other.write_bytes(b"half")
    prefix = kept.name.removesuffix(".so")[:-64]
    descriptor = os.open(kept.parent, os.O_RDONLY)
    try:
        mine = folder._keep(descriptor, prefix, b"mine", alone=False)
        assert {kept.name, other.name, mine} < set(os.listdir(descriptor))
        folder._keep(descriptor, prefix, b"mine", alone=True)
        assert sorted(os.listdir(descriptor)) == sorted(["lock", mine])
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_eight_programs_that_start_at_once_compile_each_kernel_once(fresh):
    """With the compiler of the machine: it is called three times in all."""
    log = fresh / "log"
    wrapper = fresh / "ccache"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec "$@"\n')
    wrapper.chmod(0o700)
    environment = {
        **os.environ,
        "CXX": f"{wrapper} {build._compiler()[0]}",
        "XDG_CACHE_HOME": str(fresh / "cache"),
        "MVMR_LOSS_NATIVE": "required",
    }
    command = [sys.executable, "-m", "mvmr_loss"]
    programs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    outputs = [program.communicate(timeout=500)[0] for program in programs]
    assert [program.returncode for program in programs] == [0] * 8
    assert all(output.count(" on\n") == 3 for output in outputs), outputs
    assert len(log.read_text().splitlines()) == 3
    assert len(list((fresh / "cache").rglob("*.so"))) == 3

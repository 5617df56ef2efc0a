"""Attacks on a store of representations: does it ever give a wrong number, hang, or lose a row?

Each attack is counted, and what it gets must be the right numbers, or an error that is documented.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from mvmr_loss.cache import CorruptCacheError, RepresentationCache
from mvmr_loss.cache.metadata import json_checksum

ROWS, WIDTH = 200, 100
# What a store may answer instead of right numbers, each in words: never a crash deep inside.
ANSWERS = (CorruptCacheError, ValueError, FileNotFoundError)


def add_options(parser):
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all counts")


def rows(indices, width=WIDTH):
    """Rows that are a function of their index, exact in each type of a store."""
    return {"a": torch.arange(width) % 7 + torch.as_tensor(indices)[:, None].float()}


def full(folder, **options):
    """A store that is full."""
    store = RepresentationCache.create(folder, {"a": WIDTH}, ROWS, **options)
    store.write(range(ROWS), rows(range(ROWS)))
    return store


def wrong(store):
    """Indices of rows that are there with other numbers, or damaged."""
    valid = store.is_valid().nonzero().flatten()
    if not len(valid):
        return []
    damaged = store.verify()
    return damaged or valid[(store.read(valid)["a"] != rows(valid)["a"]).any(dim=1)].tolist()


def write_all_rows(folder, seed):
    """What a writer does: what is missing, in an order of its own, in batches."""
    store = RepresentationCache.create(folder, {"a": WIDTH}, ROWS)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    for indices in order.split(8):
        missing = indices[~store.is_valid(indices)]
        if len(missing):
            store.write(missing, rows(missing))


def forked(function, *arguments):
    """Starts a child process; its exit code is 0 if the function ended well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            function(*arguments)
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(folder, draw, count):
    """Two writers, each killed at a random moment, also amid the making of the store."""
    counts, faults, before = Counter(), [], 0
    # On a machine whose clock oversleeps, writers may end before they are killed: then more rounds.
    for number in range(4 * count):
        if number >= count and counts["kills"] >= count:
            break
        children = [forked(write_all_rows, folder, draw.randrange(2**31)) for _ in range(2)]
        time.sleep(draw.uniform(0, 0.04))
        for child in children:
            os.kill(child, signal.SIGKILL)
        codes = [ended(child) for child in children]
        counts["kills"] += codes.count(-signal.SIGKILL)
        if not set(codes) <= {0, -signal.SIGKILL}:
            faults.append(f"kill {number}: a writer failed")
        if not (folder / "metadata.json").exists():
            counts["before the store was made"] += 1
            continue
        store = RepresentationCache(folder)
        valid = int(store.is_valid().sum())
        counts["in the middle"] += 0 < valid < ROWS
        if wrong(store):
            faults.append(f"kill {number}: wrong or damaged rows")
        if valid < before:
            faults.append(f"kill {number}: rows were lost")
        before = valid
        if valid == ROWS:
            shutil.rmtree(folder)
            before = 0
    return counts, faults


def rows_hurt(name, before, after):
    """Rows whose data or entry, in one of the files, are no longer what they were."""
    size = len(before) // (ROWS + 1)
    hurt = {place // size for place in range(len(before)) if before[place] != after[place]}
    # Without an entry it is made again when it is asked for; of the others, the store says that.
    return hurt - {ROWS} if name == "index.bin" and after[-1] == 0 else hurt


def meaning(data):
    """What is read from metadata, whatever its white space; None of what is no JSON."""
    try:
        return json.dumps(json.loads(data))
    except (ValueError, RecursionError):
        return None


def bit_flips(folder, draw, count):
    """One to eight bits of any file: each row that they hurt is found, and each other one is right."""
    full(folder).test_row(rows([ROWS]))
    counts, faults = Counter(), []
    files = {
        name: (folder / name).read_bytes() for name in ("rows.bin", "index.bin", "metadata.json")
    }
    for number in range(count):
        name = draw.choice(list(files))
        data = bytearray(files[name])
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(data)
        counts[f"in {name}"] += 1
        hurt = set() if name == "metadata.json" else rows_hurt(name, files[name], data)
        matters = hurt or (name == "metadata.json" and meaning(data) != meaning(files[name]))
        try:
            store = RepresentationCache(folder)
            damaged = set(store.verify())
            missing = set((~store.is_valid()).nonzero().flatten().tolist())
            whole = sorted(set(range(ROWS)) - damaged - missing)
            seen = damaged | missing
            if name == "metadata.json" and matters:
                faults.append(f"flip {number} in {name}: not found")
            elif seen != hurt:
                faults.append(f"flip {number} in {name}: hurt {sorted(hurt)}, found {sorted(seen)}")
            if not torch.equal(store.read(whole)["a"], rows(whole)["a"]):
                faults.append(f"flip {number} in {name}: wrong numbers")
            for i in damaged - {ROWS}:
                with contextlib.suppress(CorruptCacheError):
                    store.read([i])
                    faults.append(f"flip {number} in {name}: row {i} is damaged and was read")
            if ROWS in damaged:
                with contextlib.suppress(CorruptCacheError):
                    store.test_row(rows([ROWS]))
                    faults.append(f"flip {number} in {name}: the test row is damaged and was read")
        except ANSWERS as error:
            seen = name == "metadata.json" and matters
            if not seen:
                faults.append(f"flip {number} in {name}: {error!r}")
        except Exception as error:
            seen = False
            faults.append(f"flip {number} in {name}: {error!r}")
        # White space in metadata.json may change, and a bit may be flipped back.
        counts[f"{'found' if seen else 'missed' if matters else 'harmless'} in {name}"] += 1
        (folder / name).write_bytes(files[name])
    return counts, faults


def reader_while_filling(folder, draw, count):
    """Two processes fill, and a third reads whatever is there."""
    counts, faults = Counter(), []
    for number in range(count):
        RepresentationCache.create(folder, {"a": WIDTH}, ROWS)
        writers = [forked(write_all_rows, folder, draw.randrange(2**31)) for _ in range(2)]
        store, running = RepresentationCache(folder), set(writers)
        while running:
            counts["rows read meanwhile"] += int(store.is_valid().sum())
            if wrong(store):
                faults.append(f"filling {number}: wrong rows")
            for writer in list(running):
                child, status = os.waitpid(writer, os.WNOHANG)
                if child:
                    running.remove(writer)
                    if status:
                        faults.append(f"filling {number}: a writer failed")
        if not store.is_valid().all() or wrong(store):
            faults.append(f"filling {number}: the store is not full")
        counts["fillings"] += 1
        shutil.rmtree(folder)
    return counts, faults


def truncation(folder, draw, count):
    """Either file is cut, or grows, under a store that is open."""
    counts, faults = Counter(), []
    uses = {
        "read": lambda store: store.read([draw.randrange(ROWS)]),
        "is_valid": lambda store: store.is_valid(),
        "verify": lambda store: store.verify(),
        "write": lambda store: store.write([ROWS - 1], rows([ROWS - 1])),
    }
    for number in range(count):
        store = full(folder)
        name, use = draw.choice(["rows.bin", "index.bin"]), draw.choice(list(uses))
        size = (folder / name).stat().st_size
        length = draw.choice([0, 1, size - 1, size + 1, draw.randrange(size)])
        os.truncate(folder / name, length)
        try:
            uses[use](store)
            counts["not concerned"] += 1
            if name == "index.bin" or use != "is_valid":
                faults.append(f"truncation {number}: {use} did not see {name} at {length} bytes")
        except CorruptCacheError:
            counts["found"] += 1
        except Exception as error:
            faults.append(f"truncation {number}: {use}: {error!r}")
        shutil.rmtree(folder)
    return counts, faults


def full_disk(folder, draw, count):
    """No room for the files, or none when a row is written: an error, and no wrong row."""
    counts, faults = Counter(), []

    def limited(limit, call, wanted):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            call()
        except OSError as error:
            os._exit(3 if error.errno in wanted else 4)

    size = (ROWS + 1) * WIDTH * 2
    for number in range(count):
        limit = draw.randrange(size)
        making = draw.random() < 0.5
        if making:
            call = lambda: RepresentationCache.create(folder, {"a": WIDTH}, ROWS)  # noqa: E731
        else:
            RepresentationCache.create(folder, {"a": WIDTH}, ROWS)
            call = lambda: write_all_rows(folder, 0)  # noqa: E731
        code = ended(forked(limited, limit, call, (errno.EFBIG, errno.ENOSPC)))
        counts["told while making" if making else "told while writing"] += code == 3
        if code != 3:
            faults.append(f"full disk {number}: exit code {code} at {limit} bytes")
        if (folder / "metadata.json").exists() and wrong(RepresentationCache(folder)):
            faults.append(f"full disk {number}: wrong rows")
        write_all_rows(folder, 0)  # There is room again.
        if not RepresentationCache(folder).is_valid().all():
            faults.append(f"full disk {number}: cannot be filled when there is room again")
        shutil.rmtree(folder)
    return counts, faults


@contextlib.contextmanager
def small_disk(folder):
    """A file system of one megabyte in memory; gives why there is none, where it may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        refused = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        refused = str(error)
    try:
        yield refused
    finally:
        if not refused:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def full_file_system(folder, draw, count):
    """A file system that is full indeed: while a store is made, when it is filled, without its space."""
    counts, faults = Counter(), []
    kinds = ("making", "reserved", "not reserved")

    def fill_up(disk, pages):
        """Takes all the room there is, but for some pages."""
        with open(disk / "other", "wb") as file:
            free = os.statvfs(disk)
            size = (free.f_bavail - pages) * free.f_frsize
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)

    def told(call, disk):
        try:
            call()
        except OSError as error:
            if error.errno != errno.ENOSPC or str(disk) not in str(error):
                faults.append(f"full file system {number}: {kind}: {error!r}")
            return True
        return False

    with small_disk(folder.with_name("disk")) as refused:
        if refused:
            return Counter({"left out: no mounting": 1}), []
        disk = folder.with_name("disk")
        store = disk / "store"
        for number in range(count):
            kind = kinds[number % len(kinds)]
            if kind == "making":  # The rows need 11 pages, and the metadata one.
                fill_up(disk, draw.choice([11, draw.randrange(16)]))
            else:
                RepresentationCache.create(store, {"a": WIDTH}, ROWS)
                if kind == "not reserved":  # As where a file system has no means to.
                    for name in ("rows.bin", "index.bin"):
                        size = (store / name).stat().st_size
                        (store / name).unlink()
                        (store / name).touch()
                        os.truncate(store / name, size)
                fill_up(disk, 0 if kind == "reserved" else draw.randrange(11))
            was_told = told(lambda: write_all_rows(store, number), disk)  # noqa: B023
            counts[f"{kind}: {'told' if was_told else 'room enough'}"] += 1
            if kind == "reserved" and was_told:
                faults.append(f"full file system {number}: no room for rows whose room was kept")
            if kind == "not reserved" and not was_told:
                faults.append(f"full file system {number}: nothing was said")
            if (store / "metadata.json").exists() and wrong(RepresentationCache(store)):
                faults.append(f"full file system {number}: wrong rows")
            (disk / "other").unlink()  # There is room again.
            write_all_rows(store, number)
            filled = RepresentationCache(store)
            if not filled.is_valid().all() or wrong(filled):
                faults.append(f"full file system {number}: not filled when there is room again")
            del filled
            shutil.rmtree(store)
    return counts, faults


def wrong_owner(folder, draw, count):
    """A user who may not write reads; one who may not read is told so."""
    counts, faults = Counter(), []
    if os.geteuid() != 0:
        return Counter({"left out: not root": 1}), []

    def as_nobody(call, expected):
        os.setgid(65534)
        os.setuid(65534)
        try:
            os._exit(3 if call() is None and expected is None else 5)
        except OSError as error:
            os._exit(3 if expected is not None and isinstance(error, expected) else 4)

    def check_read():
        if wrong(RepresentationCache(folder)):
            raise OSError("wrong rows")

    folder.parent.chmod(0o755)
    full(folder)
    with open(folder / "index.bin", "r+b") as file:
        file.write(bytes(8))  # Row 0 is missing.
    for _ in range(count):
        readable = draw.random() < 0.5
        for file in folder.iterdir():
            file.chmod(0o644 if readable else 0o600)
        folder.chmod(0o755)
        for call, expected in (
            (check_read, None if readable else PermissionError),
            (lambda: RepresentationCache(folder).write([0], rows([0])), PermissionError),
            (lambda: RepresentationCache.create(folder / "new", {"a": 1}, 1), PermissionError),
        ):
            code = ended(forked(as_nobody, call, expected))
            counts["calls"] += 1
            if code != 3:
                faults.append(f"owner: exit code {code}, readable {readable}, {expected}")
    return counts, faults


@contextlib.contextmanager
def slow_network(draw, counts):
    """Reads and writes come late, and in pieces, as they may from a server."""
    preadv, pwrite = os.preadv, os.pwrite
    lock = threading.Lock()

    def pieces(size):
        with lock:
            counts["calls in pieces"] += size > 1
            return draw.randrange(1, size + 1), draw.uniform(0, 0.0005)

    def slow_preadv(descriptor, buffers, offset):
        part, late = pieces(len(buffers[0]))
        time.sleep(late)
        return preadv(descriptor, [buffers[0][:part]], offset)

    def slow_pwrite(descriptor, data, offset):
        part, late = pieces(len(data))
        time.sleep(late)
        return pwrite(descriptor, data[:part], offset)

    os.preadv, os.pwrite = slow_preadv, slow_pwrite
    try:
        yield
    finally:
        os.preadv, os.pwrite = preadv, pwrite


def network(folder, draw, count):
    """Reading and writing in late pieces, two threads at once, with kills between."""
    counts, faults = Counter(), []
    for number in range(count):
        with slow_network(draw, counts):
            child = forked(write_all_rows, folder, draw.randrange(2**31))
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            ended(child)
            threads = [
                threading.Thread(target=write_all_rows, args=(folder, seed)) for seed in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            store = RepresentationCache(folder)
            if wrong(store) or not store.is_valid().all():
                faults.append(f"network {number}: wrong or missing rows")
        counts["fillings"] += 1
        shutil.rmtree(folder)
    return counts, faults


def tampered(value, draw):
    """Another value in the place of one of metadata's."""
    return draw.choice(
        [None, -1, 0, 2**70, 1.5, True, "x", "", [], {}, [[]], {"a": value}, [value], "float32"]
    )


def metadata(folder, draw, count):
    """Any entry is another one, its checksum right or wrong: refused, or the right numbers."""
    full(folder, settings={"image_shape": [3, 8, 8], "fingerprint": "f"})
    original = json.loads((folder / "metadata.json").read_text())
    counts, faults = Counter(), []
    for number in range(count):
        content = json.loads(json.dumps(original))
        key = draw.choice(list(content))
        if draw.random() < 0.1:
            del content[key]
        else:
            content[key] = tampered(content[key], draw)
        sealed = key != "checksum" and draw.random() < 0.8
        if sealed:
            content.pop("checksum")
            content["checksum"] = json_checksum(content)
        else:
            sealed = json.dumps(content) == json.dumps(original)
        (folder / "metadata.json").write_text(json.dumps(content))
        try:
            store = RepresentationCache(folder)
            if wrong(store):
                faults.append(f"metadata {number}: {key}: wrong numbers")
            if not sealed:
                faults.append(f"metadata {number}: {key} = {content.get(key)!r}: not found")
            counts["of no consequence"] += 1
        except ANSWERS:
            counts["refused"] += 1
        except Exception as error:
            faults.append(f"metadata {number}: {key} = {content.get(key)!r}: {error!r}")
    return counts, faults


def threads_and_types(folder, draw, count):
    """Rows written by any number of threads, read in any type: the numbers, rounded once."""
    counts, faults = Counter(), []
    before = torch.get_num_threads()
    for number in range(count):
        dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
        threads = draw.choice([1, 2, 4])
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(number)
        x = {"a": torch.randn(ROWS, WIDTH, generator=generator) * 10 ** draw.uniform(-3, 3)}
        store = RepresentationCache.create(folder, {"a": WIDTH}, ROWS, dtype=dtype)
        store.write(range(ROWS), x)
        torch.set_num_threads(draw.choice([1, 2, 4]))
        if not torch.equal(
            RepresentationCache(folder).read(range(ROWS))["a"], x["a"].to(dtype).float()
        ):
            faults.append(f"threads {number}: {dtype}, {threads} threads: other numbers")
        counts[str(dtype).removeprefix("torch.")] += 1
        shutil.rmtree(folder)
    torch.set_num_threads(before)
    return counts, faults


def lines(figures):
    """The rows of the table in docs/trust.md: an attack, how often, faults."""
    found = []
    for name, counts in figures.items():
        if name != "faults":
            ours = {k: v for k, v in counts.items() if k not in ("faults", "seconds")}
            said = ", ".join(f"{key} {number:,}" for key, number in ours.items())
            found.append(f"| {name.replace('_', ' ')} | {said} | {counts['faults']} |")
    return found


# How often, at scale 1.
ATTACKS = {
    kills: 400,
    bit_flips: 2000,
    reader_while_filling: 20,
    truncation: 300,
    full_disk: 200,
    full_file_system: 200,
    wrong_owner: 40,
    network: 20,
    metadata: 2000,
    threads_and_types: 200,
}


def attack(settings):
    """Runs every attack on a store of its own; returns the counts and what went wrong."""
    from tests.trust.identity import identity

    figures, faults = {}, []
    for function, count in {**ATTACKS, identity: 440}.items():
        name = function.__name__
        draw = random.Random(f"{settings.seed} {name}")
        started = time.monotonic()
        # Not pytest's folder, which other users may not enter.
        with tempfile.TemporaryDirectory() as folder:
            counts, found = function(
                Path(folder) / "store", draw, max(1, round(count * settings.scale))
            )
        faults += [f"{name}: {fault}" for fault in found]
        seconds = round(time.monotonic() - started, 1)
        figures[name] = {**counts, "faults": len(found), "seconds": seconds}
        print(f"{name}: {dict(counts)}, {len(found)} faults, {seconds} s", flush=True)
    print("For docs/trust.md:", *lines(figures), sep="\n")
    return figures, faults

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from mvmr_loss.cache import (
    RepresentationCache,
)
from tests.cache.helpers import (
    ROOT,
)

WRITER = """
import sys, torch
from mvmr_loss.cache import RepresentationCache
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


def die_in_call(number):
    """Has this process kill itself in one of its writes to files: before, amidst or after it.

    An entry of the index, 8 bytes within a page, is never written in part.
    """
    left, pwrite, fsync = [number], os.pwrite, os.fsync

    def counted(call):
        left[0] -= 1
        if left[0] >= 0:
            return call(1.0)
        if number % 3:
            call(0.5 if number % 3 == 1 else 1.0)
        return os.kill(os.getpid(), signal.SIGKILL)

    def dying_pwrite(file, data, offset):
        return counted(
            lambda part: pwrite(file, data[: int(part * len(data)) if len(data) > 8 else 8], offset)
        )

    os.pwrite = dying_pwrite
    os.fsync = lambda file: counted(lambda _: fsync(file))


def kill_forks(folder, count, seed, by_call):
    """Kills writers at random moments; returns how many rows were valid after each."""
    draw, valid = random.Random(seed), []
    for i in range(count):
        number, delay = draw.randrange(150), draw.uniform(0, 0.03)
        child = os.fork()
        if child == 0:
            try:
                if by_call:
                    die_in_call(number)
                store = RepresentationCache.create(folder, {"a": 300}, 400)
                order = torch.randperm(400, generator=torch.Generator().manual_seed(i))
                for indices in order.split(8):
                    new = indices[~store.is_valid(indices)]
                    if len(new):
                        store.write(new, {"a": torch.arange(300) % 7 + new[:, None].float()})
            finally:
                os._exit(0)
        if not by_call:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (folder / "metadata.json").exists():
            valid.append(check_rows(folder))
    return valid


def test_killed_at_random_moments(tmp_path):
    valid = kill_forks(tmp_path / "s", 20, seed=0, by_call=True)
    assert valid == sorted(valid)  # No row that was there is ever lost.
    assert sum(0 < n < 400 for n in valid) > 5  # Killed in the middle, really.
    writer = start_writer(tmp_path / "s", 0)
    assert writer.communicate()[0].split() == ["ready", "done"]
    assert check_rows(tmp_path / "s") == 400


@pytest.mark.slow
def test_killed_at_random_moments_many_times(tmp_path):
    middle = 0
    for seed in range(12):
        valid = kill_forks(tmp_path / str(seed), 60, seed, by_call=seed % 2 == 0)
        assert valid == sorted(valid)
        middle += sum(0 < n < 400 for n in valid)
    assert middle > 60

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

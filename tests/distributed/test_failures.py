"""What the other processes see when one is uneven, late or dead: an error in time, never a hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from mvmr_loss import MVMRLoss
from tests.processes import outcomes, run

TIMEOUT = 4  # Seconds that the group waits.
# What raising, and a machine that is busy with other tests, may take beside it.
MARGIN = 12
PROCESSES = pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])


def training(rank, processes, *, fails=None, drop_last=True, samples=None, barrier=None):
    """Yields each step's number; ``fails`` is called at its third step in the last process."""
    torch.manual_seed(0)
    network = nn.Linear(8, 4)
    ddp = DistributedDataParallel(network)
    criterion = MVMRLoss(gather_distributed=True)
    x = torch.randn(80, 8, generator=torch.Generator().manual_seed(1))
    # Shares that are uneven, as a sampler of one's own makes them: torch's pads them.
    shares = samples or [20] * processes
    start = sum(shares[:rank])
    own = Subset(TensorDataset(x), range(start, start + shares[rank]))
    for step, (batch,) in enumerate(DataLoader(own, 4, drop_last=drop_last)):
        if step == 2 and rank == processes - 1 and fails is not None:
            fails()
        network.zero_grad()
        criterion(ddp(batch), ddp(batch.flip(1))).backward()
        yield step


def check_uneven_last_batch(rank, processes):
    """Every process is told what each one has, and can go on."""
    last = processes - 1
    steps = training(rank, processes, drop_last=False, samples=[10] * last + [9])
    for _ in range(2):
        next(steps)
    with pytest.raises(
        ValueError, match=rf"process {last} has .*\[1, 4\].* Use drop_last=True"
    ) as error:
        next(steps)
    assert "process 0 has" in str(error.value)
    assert len(list(training(rank, processes, drop_last=True, samples=[8] * processes))) == 2


def check_torchs_sampler(rank, processes):
    """DistributedSampler and drop_last, as the documentation says: no error, though 39 is odd."""
    sampler = torch.utils.data.DistributedSampler(range(39), processes, rank, shuffle=True)
    x = torch.randn(39, 8)
    criterion = MVMRLoss(gather_distributed=True)
    loader = DataLoader(TensorDataset(x), 4, sampler=sampler, drop_last=True)
    losses = [criterion(batch, batch.flip(1)) for (batch,) in loader]
    assert len(losses) == 5
    assert torch.isfinite(torch.stack(losses)).all()


def stops(reason, folder, processes):
    """What the last process does at its third step."""

    def fail():
        if reason == "raises":
            raise MemoryError("of its own")
        if reason == "dies":
            os._exit(7)
        if reason == "hangs":
            # Until the others have ended; no longer, lest the test hangs with it.
            end = time.monotonic() + TIMEOUT + MARGIN
            while time.monotonic() < end and len(list(folder.glob("ended *"))) < processes - 1:
                time.sleep(0.1)
            os._exit(7)

    return fail


def check_others_end(rank, processes, reason, folder):
    fewer = [20] * (processes - 1) + [8]
    samples = fewer if reason == "has fewer batches" else None
    steps = training(rank, processes, fails=stops(reason, folder, processes), samples=samples)
    if rank == processes - 1:
        list(steps)
        return
    for _ in range(2):
        next(steps)
    start = time.monotonic()
    with pytest.raises((RuntimeError, dist.DistBackendError)):
        list(steps)
    assert time.monotonic() - start < TIMEOUT + MARGIN
    (folder / f"ended {rank}").touch()


@PROCESSES
def test_uneven_last_batch_is_an_error_in_every_process(tmp_path, processes):
    run(processes, tmp_path, check_uneven_last_batch)


def test_torchs_sampler_gives_even_batches(tmp_path):
    run(2, tmp_path, check_torchs_sampler)


@PROCESSES
@pytest.mark.parametrize("reason", ["raises", "dies", "hangs", "has fewer batches"])
def test_one_process_that_stops_does_not_hang_the_rest(tmp_path, reason, processes):
    check = (check_others_end, reason, tmp_path)
    codes, messages = outcomes(processes, tmp_path, *check, timeout=TIMEOUT, meet=False)
    expected = {"raises": 1, "dies": 7, "hangs": 7, "has fewer batches": 0}[reason]
    assert codes == [0] * (processes - 1) + [expected], "\n".join(messages)
    assert len(messages) == (reason == "raises")
    assert all("of its own" in message for message in messages)

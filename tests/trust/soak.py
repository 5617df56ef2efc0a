"""A long training of loss, live representations and cache reading: do memory and file handles stay flat?

Every process trains a small network on images of its own, reads two representations by sample index
from one store, which all of them fill in the first epoch, computes two live, and looks at itself every
500 steps: resident memory, open file handles, threads, Python's objects. What it has after a quarter of
the steps is what it may have at the end.
"""

from __future__ import annotations

import datetime
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from mvmr_loss import MVMRLoss, Representations
from mvmr_loss.cache import IndexedDataset

SAMPLES, BATCH, SIDE = 256, 16, 16
# What may be gained over three quarters of the steps: an allocator's pages come and go.
MEMORY_MB, OBJECTS = 4.0, 200


def add_options(parser):
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)


def look():
    """What this process holds now."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "memory_mb": int(fields["VmRSS"].split()[0]) / 1024,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
        "objects": len(gc.get_objects()),
    }


def train(rank, settings, folder, results):
    """One process's training; puts what it looked like every 500 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed + rank)
    if settings.processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/group",
            rank=rank,
            world_size=settings.processes,
            timeout=datetime.timedelta(minutes=10),
        )
    images = torch.randn(SAMPLES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 64)
    )
    model = DistributedDataParallel(network) if settings.processes > 1 else network
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    criterion = MVMRLoss(gather_distributed=True)
    live = Representations(["hog"])
    stored = Representations(
        ["pixels", "local_std", "augmented_pixels"],
        sketch_dim=64,
        cache={"path": folder / "store", "num_samples": SAMPLES},
    )
    own = range(rank, SAMPLES, settings.processes)
    dataset = torch.utils.data.Subset(IndexedDataset(TensorDataset(images)), list(own))
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
    looks, step, start, finite = [], 0, time.monotonic(), True
    every = max(1, min(500, settings.steps // 40))
    while step < settings.steps:
        for indices, x in loader:
            views = x, x + 0.1 * torch.randn_like(x)
            loss = criterion(model(views[0]), model(views[1]), {**live(x), **stored(x, indices)})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            finite = finite and bool(torch.isfinite(loss))
            if step % every == 0:
                looks.append({"step": step, "loss": loss.item(), **look()})
            if step == settings.steps:
                break
    finite = finite and all(bool(torch.isfinite(p).all()) for p in network.parameters())
    seconds = round(time.monotonic() - start)
    results.put({"rank": rank, "finite": finite, "seconds": seconds, "looks": looks})
    if settings.processes > 1:
        dist.barrier()  # as in examples/several_processes.py
        dist.destroy_process_group()


def judge(result, steps):
    """What one process held over the last three quarters, and what is wrong with it."""
    late = [seen for seen in result["looks"] if seen["step"] >= steps // 4]
    figures, faults = {}, []
    for what, allowed in (
        ("memory_mb", MEMORY_MB),
        ("handles", 0),
        ("threads", 0),
        ("objects", OBJECTS),
    ):
        values = [seen[what] for seen in late]
        count = max(1, len(values) // 5)
        first, last = statistics.median(values[:count]), statistics.median(values[-count:])
        figures[what] = {"first": first, "last": last, "least": min(values), "most": max(values)}
        if last - first > allowed:
            faults.append(f"process {result['rank']}: {what} grew from {first} to {last}")
    if not result["finite"]:
        faults.append(f"process {result['rank']}: the loss or a parameter was not finite")
    return figures, faults


def attack(settings):
    """Trains in as many processes as asked for; returns figures and faults."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=train, args=(rank, settings, Path(folder), results))
            for rank in range(settings.processes)
        ]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            processes[0].join(1)
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.terminate()
                return {}, ["a process ended with an error (see above)"]
        found = sorted((results.get() for _ in processes), key=lambda result: result["rank"])
    figures, faults = {"steps": settings.steps, "processes": []}, []
    for result in found:
        held, wrong = judge(result, settings.steps)
        faults += wrong
        figures["processes"].append({**result, "last_three_quarters": held})
        print(f"process {result['rank']}: {settings.steps} steps, {result['seconds']} s, {held}")
    return figures, faults

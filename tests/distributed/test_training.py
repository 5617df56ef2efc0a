"""Ten optimiser steps in several gloo processes against one process on the whole batch."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mvmr_loss import MVMRLoss
from tests.processes import run

BATCH, STEPS = 6, 10
PROCESSES = pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
OPTIMIZERS = {
    torch.float32: functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    torch.float64: functools.partial(torch.optim.AdamW, lr=0.01),
}


class Network(nn.Module):
    """No BatchNorm: its statistics are per process. A branch may stay unused or be checkpointed."""

    def __init__(self, *, checkpointed=False, unused=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 16)
        self.block = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 12)
        self.unused = nn.Linear(16, 3) if unused else None
        self.checkpointed = checkpointed
        self.to(dtype)

    def forward(self, x):
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x)


def data(step, processes, dtype):
    """A whole batch: other content in every process and step, of uneven scale."""
    generator = torch.Generator().manual_seed(step)
    n = processes * BATCH
    scale = torch.linspace(0.1, 3.0, n, dtype=dtype)[:, None]
    x = scale * torch.randn(n, 8, generator=generator).to(dtype)
    v = x + 0.3 * torch.randn(n, 8, generator=generator).to(dtype)
    return x, v, {"a": scale[:, None] * torch.rand(n, 3, 4, generator=generator), "b": x.abs()}


def train(embed, parameters, processes, rank=None, *, dtype, micro=1, wait=contextlib.nullcontext):
    """Takes ten steps; returns the terms of each and the parameters' gradients of the last.

    Args:
        embed: From a batch to embeddings.
        parameters: What the optimiser moves.
        processes: How many processes' samples a whole batch has.
        rank: Whose share is used; None uses the whole batch, without gathering.
        dtype: Of the data.
        micro: Batches whose gradients are accumulated in a step.
        wait: Around all of these but the last.
    """
    criterion = MVMRLoss(
        representation_weights={"a": 1.0, "b": -0.5}, gather_distributed=rank is not None
    )
    # Not Adam in float32: where a gradient is nearly zero, it makes a whole step of the rounding.
    optimizer = OPTIMIZERS[dtype](parameters)
    rows = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    terms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(micro):
            x, v, ys = data(step * micro + part, processes, dtype)
            with wait() if part < micro - 1 else contextlib.nullcontext():
                z, z_augmented = embed(torch.cat([x[rows], v[rows]])).chunk(2)
                components = criterion.forward_components(
                    z, z_augmented, {name: y[rows] for name, y in ys.items()}
                )
                (components.total / micro).backward()
            terms.append(torch.stack(list(components.as_dict().values())).detach())
        optimizer.step()
    return torch.stack(terms)


def flat(tensors):
    """All numbers of several tensors, those of FSDP's shards gathered."""
    return torch.cat([getattr(t, "full_tensor", lambda t=t: t)().flatten() for t in tensors])


def compare(embed, network, processes, rank, *, micro=1, **options):
    """Trains in all processes, and alone, and compares terms, gradients and parameters."""
    dtype = next(network.parameters()).dtype
    most = {torch.float32: 1e-5, torch.float64: 1e-8}[dtype]
    alone, start = Network(dtype=dtype), Network(dtype=dtype)
    own = dict(network.named_parameters())
    terms = train(embed, own.values(), processes, rank, dtype=dtype, micro=micro, **options)
    expected = train(alone, alone.parameters(), processes, dtype=dtype, micro=micro)
    torch.testing.assert_close(terms, expected, rtol=most, atol=most)
    names = dict(alone.named_parameters())
    for what in (lambda p: p.grad, lambda p: p.detach()):
        actual, wanted = flat(what(own[name]) for name in names), flat(map(what, names.values()))
        error = (actual - wanted).norm() / wanted.norm()
        assert error <= most, error
    moved = flat(alone.parameters()) - flat(start.parameters())
    assert moved.norm() > 0.1  # It did train.


def check_ddp(rank, processes, options, network_options):
    network = Network(**network_options)
    ddp = DistributedDataParallel(network, **options)
    compare(ddp, network, processes, rank)


def check_accumulation(rank, processes, options):
    network = Network()
    ddp = DistributedDataParallel(network, **options)
    synchronised = iter([contextlib.nullcontext()] * 2 if options else [])
    # A static graph is learnt in the first step, which torch wants without no_sync, whatever the loss.
    compare(
        *(ddp, network, processes, rank),
        micro=3,
        wait=lambda: next(synchronised, None) or ddp.no_sync(),
    )


def check_compiled(rank, processes, backend):
    network = Network()
    ddp = DistributedDataParallel(network)
    compare(torch.compile(ddp, backend=backend), network, processes, rank)


def check_fsdp(rank, processes, checkpointed):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = Network(checkpointed=checkpointed)
    mesh = init_device_mesh("cpu", (processes,))
    for part in (network.block, network.head, network):
        fully_shard(part, mesh=mesh)
    compare(network, network, processes, rank)


def check_call_for_each_view(rank, processes):
    """The network is called once a view, as most loops do."""
    network = Network()
    ddp = DistributedDataParallel(network)
    compare(lambda x: torch.cat([ddp(part) for part in x.chunk(2)]), network, processes, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("processes", [2, 4])
def test_ten_steps_equal_one_process(tmp_path, processes, dtype):
    run(processes, tmp_path, check_ddp, {}, {"dtype": dtype})


@PROCESSES
@pytest.mark.parametrize(
    ("options", "network_options"),
    [
        ({"static_graph": True}, {}),
        ({"find_unused_parameters": True}, {"unused": True}),
        ({"gradient_as_bucket_view": True}, {}),
        ({}, {"checkpointed": True}),
        ({"static_graph": True}, {"checkpointed": True}),
    ],
    ids=["static", "unused", "views", "checkpointed", "static and checkpointed"],
)
def test_ddp(tmp_path, options, network_options, processes):
    run(processes, tmp_path, check_ddp, options, network_options)


@PROCESSES
@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=["plain", "static"])
def test_accumulation(tmp_path, options, processes):
    run(processes, tmp_path, check_accumulation, options)


def test_a_call_for_each_view(tmp_path):
    run(2, tmp_path, check_call_for_each_view)


@PROCESSES
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_ddp(tmp_path, backend, processes):
    run(processes, tmp_path, check_compiled, backend)


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 has fully_shard for accelerators only"
)
@PROCESSES
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fsdp(tmp_path, checkpointed, processes):
    run(processes, tmp_path, check_fsdp, checkpointed)

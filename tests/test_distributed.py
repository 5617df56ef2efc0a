"""The gathered loss in several gloo processes against one process on the whole batch."""

import datetime
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss
from mvmr_loss.distributed import Gatherer, world_size

BATCH, WIDTH = 6, 5


def network():
    torch.manual_seed(0)
    # No BatchNorm: its statistics are per process, and would hide an error of the gathering.
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def data(processes):
    """Different content in every process, of uneven scale."""
    generator = torch.Generator().manual_seed(1)
    n = processes * BATCH
    scale = torch.linspace(0.1, 3.0, n)[:, None]
    x = scale * torch.randn(n, 8, generator=generator)
    v = x + 0.3 * torch.randn(n, 8, generator=generator)
    return x, v, {"a": scale[:, None] * torch.rand(n, 3, 4, generator=generator), "b": x.abs()}


def loss_of(kind, net, x, v, ys, gather):
    if kind == "regularizer":
        return MultiRepresentationRegularizer({"a": 1.0, "b": -0.5}, gather_distributed=gather)(
            [net(x), net(v)], ys
        )
    return MVMRLoss(
        dependence_measure=kind,
        representation_weights={"a": 1.0, "b": -0.5},
        gather_distributed=gather,
    )(net(x), [net(v), net(2 * v)], ys)


def shard(tensor, rank):
    return tensor[rank * BATCH : (rank + 1) * BATCH]


def check_equals_whole_batch(rank, processes, kind):
    x, v, ys = data(processes)
    net = DistributedDataParallel(network())
    loss = loss_of(
        kind, net, shard(x, rank), shard(v, rank), {k: shard(y, rank) for k, y in ys.items()}, True
    )
    loss.backward()
    alone = network()
    expected = loss_of(kind, alone, x, v, ys, False)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    actual = torch.cat([p.grad.flatten() for p in net.parameters()])
    wanted = torch.cat([p.grad.flatten() for p in alone.parameters()])
    assert (actual - wanted).norm() / wanted.norm() <= 1e-5


def check_double_backward(rank, processes):
    x, v, ys = data(processes)
    criterion = MVMRLoss(gather_distributed=True)
    z = shard(x, rank).clone().requires_grad_()
    first = torch.autograd.grad(criterion(z, shard(v, rank)), z, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), z)[0]
    assert torch.isfinite(second).all()
    assert second.abs().sum() > 0


def check_unequal_batches(rank, processes):
    x, v, _ = data(processes)
    n = BATCH - rank
    with pytest.raises(ValueError, match=r"batch sizes per process are \[6, 5\].*drop_last=True"):
        MVMRLoss(gather_distributed=True)(shard(x, rank)[:n], shard(v, rank)[:n])


def check_a_last_batch_that_differs(rank, processes):
    x, v, _ = data(processes)
    criterion = MVMRLoss(gather_distributed=True)
    criterion(shard(x, rank), shard(v, rank))
    n = BATCH - rank
    with pytest.raises(ValueError, match="equal shapes in all processes"):
        criterion(shard(x, rank)[:n], shard(v, rank)[:n])


def check_different_representations(rank, processes):
    x, v, ys = data(processes)
    some = {k: shard(y, rank) for k, y in list(ys.items())[: rank + 1]}
    with pytest.raises(ValueError, match=r"with \[3, 4\] tensors"):
        MVMRLoss(gather_distributed=True)(shard(x, rank), shard(v, rank), some)


def check_small_local_batches(rank, processes):
    """Four samples in all are enough for the corrected measure, though each process has two."""
    x, v, _ = data(processes)
    criterion = MVMRLoss(dependence_measure="u_distance_correlation_sqr", gather_distributed=True)
    assert torch.isfinite(criterion(shard(x, rank)[:2], shard(v, rank)[:2]))


def _process(rank, processes, store, check, arguments, errors):
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=processes,
            timeout=datetime.timedelta(seconds=60),
        )
        assert world_size() == processes
        check(rank, processes, *arguments)
        dist.barrier()
    except BaseException:
        errors.put(f"process {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(processes, tmp_path, check, *arguments):
    """Runs ``check(rank, processes, ...)`` in that many gloo processes; shows each traceback."""
    # Forked from a server that has imported torch but started no thread: fast, and safe to fork.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mvmr_loss"])
    errors = context.SimpleQueue()
    workers = [
        context.Process(
            target=_process,
            args=(rank, processes, tmp_path / "store", check, arguments, errors),
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    alive = [worker for worker in workers if worker.is_alive()]
    for worker in alive:
        worker.kill()
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    assert not messages, "\n".join(messages)
    assert not alive, "a process hangs"
    assert [worker.exitcode for worker in workers] == [0] * processes


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "kind", ["distance_correlation", "u_distance_correlation_sqr", "debiased_cka", "regularizer"]
)
def test_equals_one_process_on_the_whole_batch(tmp_path, processes, kind):
    run(processes, tmp_path, check_equals_whole_batch, kind)


@pytest.mark.parametrize(
    "check",
    [
        check_double_backward,
        check_unequal_batches,
        check_a_last_batch_that_differs,
        check_different_representations,
        check_small_local_batches,
    ],
)
def test_two_processes(tmp_path, check):
    run(2, tmp_path, check)


def test_without_process_group_is_a_no_op():
    x, v, ys = data(1)
    tensors = [x, v]
    assert Gatherer()(tensors) is tensors
    torch.testing.assert_close(
        MVMRLoss(gather_distributed=True)(x, v, ys), MVMRLoss()(x, v, ys), rtol=0, atol=0
    )

"""Loss and gradients in chunks against those of the whole batch in one pass."""

import contextlib
import copy
import weakref

import pytest
import torch
from lightly.loss import VICRegLoss
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from mvmr_loss import MVMRLoss, backward_in_chunks
from tests.processes import run

N, INPUTS, WIDTH = 22, 8, 5


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 32), *layers, nn.Tanh(), nn.Linear(32, WIDTH))


def data(n=N, views=2):
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 3.0, n)[:, None]
    first = scale * torch.randn(n, INPUTS, generator=generator)
    noise = [0.3 * torch.randn(n, INPUTS, generator=generator) for _ in range(views - 1)]
    return [first, *(first + e for e in noise)]


def mvmr(views, **options):
    criterion = MVMRLoss(**options)
    return lambda z, *others: criterion(z, list(others), {"inputs": views[0]})


def gradients(*networks):
    return torch.cat([p.grad.flatten() for net in networks for p in net.parameters()])


def assert_close(actual, expected, tolerance=1e-5):
    assert expected.norm() > 0
    assert (actual - expected).norm() <= tolerance * expected.norm()


def check(net, views, loss_of, chunk_size=5, embed=None, tolerance=1e-5, **options):
    """Loss and gradients of ``net``, through ``embed(net)``, equal those of one pass."""
    embed = embed or (lambda net: net)
    alone = copy.deepcopy(net)
    expected = loss_of(*[embed(alone)(view) for view in views])
    expected.backward()
    loss = backward_in_chunks(embed(net), views, loss_of, chunk_size, **options)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
    assert_close(gradients(net), gradients(alone), tolerance)


@pytest.mark.parametrize("chunk_size", [1, 5, 11, N, 100])
@pytest.mark.parametrize("views", [2, 3])
def test_equals_the_whole_batch(chunk_size, views):
    views = data(views=views)
    check(network(), views, mvmr(views), chunk_size)


@pytest.mark.parametrize(
    "loss_of",
    [VICRegLoss(), lambda z, v: nn.functional.cross_entropy(z @ v.T, torch.arange(N))],
    ids=["vicreg", "contrastive"],
)
def test_any_loss(loss_of):
    check(network(), data(), loss_of)


def test_one_view_need_not_be_in_a_list():
    net, alone, x = network(), network(), data()[0]
    loss = backward_in_chunks(net, x, lambda z: z.var(dim=0).sum(), chunk_size=4)
    expected = alone(x).var(dim=0).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_close(gradients(net), gradients(alone))


def test_layers_that_see_one_sample():
    check(network(nn.LayerNorm(32), nn.GroupNorm(4, 32)), data(), mvmr(data()))


def test_a_network_for_each_view_and_parameters_of_the_loss():
    views, towers = data(), [network(), network(nn.ReLU())]
    head, copies = nn.Linear(WIDTH, WIDTH), copy.deepcopy(towers)
    head_alone = copy.deepcopy(head)

    def loss_with(head):
        return lambda z, v: MVMRLoss()(head(z), head(v))

    backward_in_chunks(towers, views, loss_with(head), chunk_size=5)
    loss_with(head_alone)(*[net(x) for net, x in zip(copies, views, strict=True)]).backward()
    assert_close(gradients(*towers), gradients(*copies))
    assert_close(gradients(head), gradients(head_alone))


def test_samples_by_index():
    x, scale = data()[0], torch.rand(N)
    rows = torch.arange(N)
    check(
        network(),
        [rows, rows],
        mvmr([x]),
        embed=lambda net: lambda rows: net(x[rows]) * scale[rows, None],
    )


def test_a_view_that_the_loss_does_not_use():
    views = data()
    net, alone = network(), network()
    backward_in_chunks(net, views, lambda z, v: z.var(dim=0).sum(), chunk_size=5)
    alone(views[0]).var(dim=0).sum().backward()
    assert_close(gradients(net), gradients(alone))


def test_gradients_are_accumulated():
    net, alone = network(), network()
    batches = [data(), [2 * view for view in data()]]
    for views in batches:
        backward_in_chunks(net, views, lambda *z, views=views: mvmr(views)(*z) / 2, chunk_size=5)
        (mvmr(views)(*map(alone, views)) / 2).backward()
    assert_close(gradients(net), gradients(alone))


class Recorder(nn.Module):
    """Keeps what it puts out, by whether there is a graph."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.seen = {False: [], True: []}

    def forward(self, x):
        z = self.net(x)
        self.seen[torch.is_grad_enabled()].append(z.detach().clone())
        return z


def test_dropout_is_the_same_in_both_passes_and_another_in_each_chunk():
    net = Recorder(network(nn.Dropout(0.5)))
    x = data()[0][:1].repeat(N, 1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.rand(2)
    backward_in_chunks(net, [x, x], lambda z, v: MVMRLoss()(z + torch.rand(()), v), chunk_size=11)
    left = torch.rand(4)
    first, second = net.seen[False], net.seen[True]
    assert len(first) == len(second) == 4
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not any(torch.equal(first[0], z) for z in first[1:])
    # What follows draws what it would have drawn after one pass.
    torch.set_rng_state(before)
    torch.rand(2)
    with torch.no_grad():
        for part in x.split(11) * 2:
            net.net(part)
    torch.rand(())
    torch.testing.assert_close(torch.rand(4), left, rtol=0, atol=0)


def test_dropout_has_the_gradient_of_the_masks_drawn():
    net, views = network(nn.Dropout(0.5)), data()
    alone = copy.deepcopy(net)
    torch.manual_seed(3)
    loss = backward_in_chunks(net, views, mvmr(views), chunk_size=5)
    torch.manual_seed(3)
    z = [torch.cat([alone(part) for part in view.split(5)]) for view in views]
    expected = mvmr(views)(*z)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_close(gradients(net), gradients(alone))


def test_batch_norm_is_that_of_the_chunks():
    net, views = network(nn.BatchNorm1d(32)), data()
    alone = copy.deepcopy(net)
    backward_in_chunks(net, views, mvmr(views), chunk_size=11)
    mvmr(views)(*[torch.cat([alone(part) for part in v.split(11)]) for v in views]).backward()
    assert_close(gradients(net), gradients(alone))
    assert net[1].num_batches_tracked == 2 * alone[1].num_batches_tracked


@pytest.mark.parametrize("around", [True, False])
def test_autocast(around):
    net, alone, views = network(), network(), data()

    def in_bfloat16(net):
        def embed(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x)

        return embed

    with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
        embed = net if around else in_bfloat16(net)
        loss = backward_in_chunks(embed, views, mvmr(views), chunk_size=5)
    z = [in_bfloat16(alone)(view) for view in views]
    assert z[0].dtype == torch.bfloat16
    expected = mvmr(views)(*z)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-3, atol=0)
    # Gradients of weights are rounded to bfloat16 in each chunk.
    assert_close(gradients(net), gradients(alone), 1e-2)


def test_grad_scaler():
    views, nets = data(), [network(), network()]
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        if net is nets[0]:
            loss = backward_in_chunks(net, views, mvmr(views), chunk_size=5, scaler=scaler)
        else:
            expected = mvmr(views)(*map(net, views))
            scaler.scale(expected).backward()
        assert gradients(net).norm() > 10
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    for actual, wanted in zip(*[net.parameters() for net in nets], strict=True):
        torch.testing.assert_close(actual, wanted)


def test_grad_scaler_skips_a_step_that_overflows():
    net, views = network(), data()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    backward_in_chunks(net, views, lambda *z: 1e6 * mvmr(views)(*z), chunk_size=5, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert scaler.get_scale() < 2.0**127


@pytest.mark.parametrize("dropout", [False, True])
def test_compiled(dropout):
    views = data(20)
    net = network(*[nn.Dropout(0.5)] * dropout)
    recorder = Recorder(torch.compile(net, backend="aot_eager"))
    loss = backward_in_chunks(recorder, views, mvmr(views), chunk_size=5)
    torch.testing.assert_close(recorder.seen[False], recorder.seen[True], rtol=0, atol=0)
    z = [torch.cat(recorder.seen[True][k : k + 4]) for k in (0, 4)]
    torch.testing.assert_close(loss, mvmr(views)(*z))
    if not dropout:
        check(network(), views, mvmr(views), embed=lambda net: torch.compile(net, backend="eager"))


def peak_of_saved_bytes(step):
    """Returns how many bytes graphs have saved at most at one time."""
    live = peak = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor = tensor
            size = tensor.numel() * tensor.element_size()
            live += size
            peak = max(peak, live)
            weakref.finalize(self, release, size)

    def release(size):
        nonlocal live
        live -= size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step()
    assert live == 0
    return peak


def test_memory_is_that_of_a_chunk():
    deep = network(*[layer for _ in range(20) for layer in (nn.Linear(32, 32), nn.Tanh())])
    views = data(256)

    def loss_of(z, v):
        return (z - v).square().mean()

    whole = peak_of_saved_bytes(lambda: loss_of(*map(deep, views)).backward())
    chunk = peak_of_saved_bytes(lambda: deep(views[0][:16]).sum().backward())
    own = peak_of_saved_bytes(lambda: backward_in_chunks(deep, views, loss_of, chunk_size=16))
    assert own <= 1.01 * chunk
    assert own < whole / 4
    twice = peak_of_saved_bytes(
        lambda: backward_in_chunks(deep, [*views, *views], lambda *z: sum(z).mean(), chunk_size=16)
    )
    assert twice == own


def share(view, rank, processes):
    return view.chunk(processes)[rank]


def check_processes(rank, processes, kind):
    views = data(12 * processes)
    own = [share(view, rank, processes) for view in views]
    net = DistributedDataParallel(network())
    exchanges = []

    def count(state, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(None, bucket)

    net.register_comm_hook(None, count)
    embed, options = {
        "module": (net, {}),
        "function": (lambda x: net(x), {"no_sync": net.no_sync}),
        "each chunk": (lambda x: net(x), {}),
        "accumulated": (net, {}),
        "towers": ([net, lambda x: net(x)], {"no_sync": net.no_sync}),
    }[kind]
    loss_of = mvmr(own, gather_distributed=True)
    if kind == "accumulated":
        with net.no_sync():
            backward_in_chunks(embed, own, loss_of, chunk_size=5)
        assert not exchanges
    loss = backward_in_chunks(embed, own, loss_of, chunk_size=5, **options)
    assert len(exchanges) == {"each chunk": 6, "towers": 2}.get(kind, 1)
    alone = network()
    expected = mvmr(views)(*map(alone, views))
    (expected * (2 if kind == "accumulated" else 1)).backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(gradients(net), gradients(alone))
    # The next step finds all in order.
    net.zero_grad()
    backward_in_chunks(embed, own, loss_of, chunk_size=7, **options)
    assert_close(gradients(net), gradients(alone) / (2 if kind == "accumulated" else 1))


@pytest.mark.parametrize("kind", ["module", "function", "each chunk", "accumulated", "towers"])
def test_two_processes(tmp_path, kind):
    run(2, tmp_path, check_processes, kind)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1 but is 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int but is a float"),
        ({"views": []}, ValueError, "views must be at least one"),
        ({"views": [torch.zeros(0, INPUTS)]}, ValueError, r"lengths \[0\]"),
        ({"embed": [network()]}, ValueError, r"lengths \[22, 22\] and embed is 1"),
        (
            {"embed": lambda x: (x, x)},
            TypeError,
            "embed's output must be a torch.Tensor but is a tuple",
        ),
        ({"embed": lambda x: x.argmax(1)}, TypeError, "embed's output must have a floating-point"),
        (
            {"embed": lambda x: x.mean(0)},
            ValueError,
            r"row for each of a chunk's 5 samples .* \(8,\)",
        ),
        ({"embed": lambda x: x.mean()}, ValueError, r"row for each .* has shape \(\)"),
        ({"embed": lambda x: x}, ValueError, "embed's output must have a gradient but has none"),
        ({"loss_of_embeddings": lambda z, v: 0.0}, TypeError, "output must be a torch.Tensor"),
        (
            {"loss_of_embeddings": lambda z, v: z},
            ValueError,
            r"be a scalar but has shape \(22, 5\)",
        ),
        (
            {"loss_of_embeddings": lambda z, v: z.detach().sum()},
            ValueError,
            "loss_of_embeddings' output must have a gradient but has none",
        ),
        (
            {"loss_of_embeddings": lambda z, v: torch.ones((), requires_grad=True) * 2},
            ValueError,
            "must depend on the embeddings",
        ),
    ],
)
def test_errors(change, error, match):
    given = {
        "embed": network(),
        "views": data(),
        "loss_of_embeddings": lambda z, v: MVMRLoss()(z, v),
        "chunk_size": 5,
    }
    with pytest.raises(error, match=match):
        backward_in_chunks(**{**given, **change})


def test_without_gradients():
    with torch.no_grad(), pytest.raises(ValueError, match=r"under torch.no_grad\(\)"):
        backward_in_chunks(network(), data(), MVMRLoss(), chunk_size=5)

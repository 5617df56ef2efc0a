"""Parts of matrices against the whole: rows, as several processes have them, stacks and slices."""

import threading

import pytest
import torch

from mvmr_loss.dependence import dependence_measure, matrices, measures
from mvmr_loss.dependence.matrices import squared_distances
from mvmr_loss.distributed import Rows

MEASURES = [
    *("distance_correlation", "u_distance_correlation_sqr", "distance_covariance"),
    *("hsic", "unbiased_hsic", "debiased_cka", "u_distance_covariance_sqr"),
]
PARTS = [(0, 3), (3, 7), (7, 9)]


def batches(dtype=torch.float64, n=9):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    return [x.to(dtype), (x.square() + 0.3 * y + 5).to(dtype), (1e-3 * y[:, :2]).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("start", "stop"), PARTS)
def test_rows_of_squared_distances(dtype, start, stop):
    given = [x.double() for x in batches(dtype)]
    whole, units = squared_distances(given)
    rows, same = squared_distances(given, Rows(start, stop))
    torch.testing.assert_close(rows, whole[:, start:stop])
    assert torch.equal(units, same)
    exact = torch.stack([torch.cdist(x, x).square() for x in given]) / units[:, None, None] ** 2
    torch.testing.assert_close(whole, exact, rtol=1e-9, atol=1e-12)
    assert ((whole.amax((1, 2)) > 1 / 16) & (whole.amax((1, 2)) <= 1)).all()


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_the_rows_add_up(create_graph):
    given = [x.requires_grad_() for x in batches()]
    weight = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight + weight.mT
    whole, _ = squared_distances(given)
    expected = torch.autograd.grad((whole * weight).sum(), given)
    total = [torch.zeros_like(x) for x in given]
    for start, stop in PARTS:
        rows, _ = squared_distances(given, Rows(start, stop))
        found = torch.autograd.grad(
            (rows * weight[:, start:stop]).sum(), given, create_graph=create_graph
        )
        total = [a + b for a, b in zip(total, found, strict=True)]
    torch.testing.assert_close(total, list(expected))


@pytest.mark.parametrize(("start", "stop"), [(0, None), *PARTS])
def test_forward_derivative(start, stop):
    given = batches()
    tangents = [x.cos() for x in given]

    def function(*xs):
        squared, units = squared_distances(xs, Rows(start, stop))
        return squared * units[:, None, None] ** 2

    def plain(*xs):
        return torch.stack([(x[start:stop, None] - x).square().sum(2) for x in xs])

    for found, expected in zip(
        torch.func.jvp(function, tuple(given), tuple(tangents)),
        torch.func.jvp(plain, tuple(given), tuple(tangents)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    # One input that does not move.
    moved = torch.func.jvp(lambda x: function(x, *given[1:]), (given[0],), (tangents[0],))[1]
    assert torch.equal(moved[1:], torch.zeros_like(moved[1:]))
    torch.testing.assert_close(moved[0], expected[0])


class Threads:
    """What several processes exchange, among threads; values only."""

    def __init__(self, count):
        self.shared, self.barrier = [None] * count, threading.Barrier(count)

    def exchange(self, place, x):
        self.barrier.wait()
        self.shared[place] = x
        self.barrier.wait()
        return list(self.shared)


class ThreadRows(Rows):
    """The rows of one thread."""

    def sum(self, x):
        return sum(THREADS.exchange(PARTS.index((self.start, self.stop)), x))

    def concatenate(self, x):
        return torch.cat(THREADS.exchange(PARTS.index((self.start, self.stop)), x), dim=1)


THREADS = Threads(len(PARTS))


def in_threads(function):
    """Returns what each thread's rows give."""
    results = [None] * len(PARTS)

    def work(place):
        with torch.no_grad():
            results[place] = function(ThreadRows(*PARTS[place]))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(PARTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    THREADS.barrier.reset()
    return results


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [None, 2, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_rows_of_all_make_the_whole(name, dtype, block_size, ties):
    given = [x.round(decimals=0) if ties else x for x in batches(dtype)]
    if ties:  # most of the distances are 0
        given[0] = torch.eye(9, 1, dtype=dtype)
    pairs = [(0, 1), (2, 0), (1, 1)]
    measure = dependence_measure(name)
    expected = measure.compare(given, pairs)
    if block_size is not None and "distance" in name:
        measure = dependence_measure(name, block_size=block_size)
    for found in in_threads(lambda rows: measure.compare(given, pairs, rows)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_one_batch_after_the_other_is_all_in_a_stack(name, monkeypatch):
    given = [x.requires_grad_() for x in batches()]
    pairs = [(0, 1), (2, 0), (1, 1), (1, 2)]
    measure = dependence_measure(name)
    expected = measure.compare(given, pairs)
    gradients = torch.autograd.grad(expected.sum(), given)
    calls = []

    def counted(group, rows):
        calls.append(len(group))
        return squared_distances(group, rows)

    monkeypatch.setattr(measures, "squared_distances", counted)
    # Three matrices of 9 x 9: one number less than they have.
    monkeypatch.setattr(measures, "_STACK_NUMBERS", 3 * 81 - 1)
    found = measure.compare(given, pairs)
    assert calls == [1, 1, 1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), given), gradients)
    monkeypatch.setattr(measures, "_STACK_NUMBERS", 3 * 81)
    measure.compare(given, pairs)
    assert calls == [1, 1, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [Rows(), Rows(2, 6)])
def test_wide_batches_are_read_in_slices(dtype, rows, monkeypatch):
    monkeypatch.setattr(matrices, "_is_for_kernel", lambda x: False)
    given = batches(dtype)
    expected, units = squared_distances(given, rows)
    monkeypatch.setattr(matrices, "_WIDE_NUMBERS", 9 * 3)
    found, same = squared_distances(given, rows)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert torch.equal(units, same)


def test_many_close_pairs_are_corrected_in_parts(monkeypatch):
    x = batches(torch.float32, 32)[0]
    x[1::2] = x[::2] + 1e-4 * x[1::2]
    expected = torch.cdist(x.double(), x.double()).square()
    for numbers in (2**24, 8 * 4 * 3):
        monkeypatch.setattr(matrices, "_WIDE_NUMBERS", numbers)
        squared, units = squared_distances([x])
        assert squared.dtype == torch.float32
        found = squared[0].double() * units[0] ** 2
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        torch.testing.assert_close(found, found.T, rtol=0, atol=0)

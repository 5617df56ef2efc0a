"""The counter-based generator: published numbers, slices, statistics, compile."""

import numpy as np
import pytest
import torch

from mvmr_loss._random import random_bits, random_signs, threefry_2x32, uniform


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers_of_random123(key, counter, expected):
    x, y = threefry_2x32(key, (torch.tensor(counter[0]), torch.tensor(counter[1])))
    assert (int(x), int(y)) == expected


def test_stored_values():
    assert random_bits(0, 0, 3).tolist() == [1797259609, 1351547692, 1688610540]
    assert random_bits(12345678901234567890, 2**40 - 1, 3).tolist() == [
        4025841737,
        588882315,
        1938947138,
    ]
    signs = [-1, -1, -1, -1, -1, -1, 1, -1, 1, 1, -1, 1]
    assert random_signs(7, 30, 12).tolist() == signs
    assert uniform(0, 0, 1).item() == (1797259609 >> 8) / 2**24


@pytest.mark.parametrize("draw", [random_bits, uniform, random_signs])
@pytest.mark.parametrize("start", [0, 1, 31, 32, 33, 2**32 - 5])
def test_slices(draw, start):
    whole = draw(3, start, 100)
    assert whole.shape == (100,)
    parts = [draw(3, start + i, min(7, 100 - i)) for i in range(0, 100, 7)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("draw", [random_bits, uniform, random_signs])
def test_numpy_numbers(draw):
    assert torch.equal(draw(np.uint64(2**63 + 1), np.int64(5), 9), draw(2**63 + 1, 5, 9))


def test_start_as_tensor():
    start = torch.tensor(2**33 + 5)
    assert torch.equal(random_bits(1, start, 10), random_bits(1, int(start), 10))


def test_types():
    assert random_bits(0, 0, 5).dtype == torch.int64
    assert uniform(0, 0, 5).dtype == torch.float32
    assert torch.equal(uniform(0, 0, 9).double(), uniform(0, 0, 9, dtype=torch.float64))
    assert random_signs(0, 0, 5, dtype=torch.float16).dtype == torch.float16
    assert random_bits(0, 0, 0).shape == random_signs(0, 5, 0).shape == (0,)


def test_statistics():
    n = 1 << 18
    u = uniform(5, 0, n, dtype=torch.float64)
    assert u.min() >= 0
    assert u.max() < 1
    # Five standard deviations of each figure; the numbers are fixed, so this cannot be flaky.
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    counts = torch.histc(u.float(), 256, 0, 1).double()
    chi_squared = ((counts - n / 256).square() / (n / 256)).sum()
    assert abs(chi_squared - 255) < 5 * 510**0.5
    centred = u - 1 / 2
    for lag in (1, 2, 31, 32):
        correlation = 12 * (centred[lag:] * centred[:-lag]).mean()
        assert abs(correlation) < 5 * n**-0.5


def test_each_bit_is_fair():
    n = 1 << 16
    bits = (random_bits(9, 0, n)[:, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 * n**-0.5


def test_signs_are_fair_and_uncorrelated():
    n = 1 << 18
    signs = random_signs(0, 0, n, dtype=torch.float64)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert signs.mean().abs() < 5 * n**-0.5
    for lag in (1, 31, 32, 1024):
        assert (signs[lag:] * signs[:-lag]).mean().abs() < 5 * n**-0.5


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**63, 2**64 - 1])
def test_no_overlap_between_seeds(other):
    n = 1 << 12
    a, b = random_bits(0, 0, n), random_bits(other, 0, n)
    pairs = set(zip(a[:-1].tolist(), a[1:].tolist(), strict=True))
    # Two stretches of one sequence would have a pair of neighbours in common; chance is 1e-12.
    assert not pairs & set(zip(b[:-1].tolist(), b[1:].tolist(), strict=True))
    u, v = uniform(0, 0, n) - 0.5, uniform(other, 0, n) - 0.5
    assert (12 * (u * v).mean()).abs() < 5 * n**-0.5


def test_torch_seed_plays_no_part():
    before = torch.get_rng_state()
    first = random_bits(0, 0, 4)
    torch.manual_seed(1)
    assert torch.equal(random_bits(0, 0, 4), first)
    torch.set_rng_state(before)
    uniform(0, 0, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    compiled = torch.compile(
        lambda start: random_bits(2**63 + 7, start, 64), fullgraph=True, backend=backend
    )
    for start in (0, 2**34):
        expected = random_bits(2**63 + 7, start, 64)
        assert torch.equal(compiled(torch.tensor(start)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_gpu():
    assert torch.equal(random_bits(1, 5, 1000, "cuda").cpu(), random_bits(1, 5, 1000))
    assert torch.equal(uniform(1, 5, 1000, "cuda").cpu(), uniform(1, 5, 1000))
    assert torch.equal(random_signs(1, 5, 1000, "cuda").cpu(), random_signs(1, 5, 1000))


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed must be at least 0 but is -1"),
        (2**64, ValueError, "seed must be at most 18446744073709551615"),
        (1.0, TypeError, "seed must be an int but is a float"),
        (True, TypeError, "seed must be an int but is a bool"),
    ],
)
def test_exception(seed, error, message):
    with pytest.raises(error, match=message):
        random_bits(seed, 0, 1)

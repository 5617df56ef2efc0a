"""Whole trainings in half, single and double precision."""

from __future__ import annotations

import pytest
import torch

from tests.trust.training import Training

HALF = [torch.bfloat16, torch.float16]


def tail(losses):
    """What a training has reached: the mean of its last fifth."""
    return losses[-len(losses) // 5 :].double().mean()


def gradients(training):
    return torch.cat([p.grad.double().flatten() for p in training.head.parameters()])


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_one_step_is_that_of_float32(dtype):
    one, other = Training(), Training(dtype=dtype)
    torch.manual_seed(1)
    loss = other.step()
    torch.manual_seed(1)
    expected = one.step()
    # Under autocast the loss itself is computed in float32, from embeddings in half precision.
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    digits = {torch.bfloat16: 0.03, torch.float16: 0.003, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(loss.double(), expected.double(), rtol=digits, atol=0)
    error = (gradients(other) - gradients(one)).norm() / gradients(one).norm()
    assert error < 10 * digits


@pytest.mark.parametrize("dtype", HALF)
def test_gradient_scaler(dtype):
    """Scaled gradients that overflow are skipped, and the scale comes down until they fit."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=20)
    training = Training(dtype=dtype, scaler=scaler)
    losses = training.run(50)
    assert torch.isfinite(losses).all()
    assert tail(losses) < losses[:5].double().mean() - 0.1
    assert (scaler.get_scale() < 2.0**30) == (dtype == torch.float16)
    assert all(torch.isfinite(p).all() for p in training.head.parameters())


def test_short_run_in_half_precision_follows_float32():
    reached = {dtype: tail(Training(dtype=dtype).run(40)) for dtype in (torch.float32, *HALF)}
    for dtype in HALF:
        assert abs(reached[dtype] - reached[torch.float32]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["distance_correlation", "u_distance_correlation_sqr", "hsic"])
def test_five_hundred_steps_in_bf16_reach_float32(measure):
    """Over three seeds, the difference of the means is below the spread over seeds."""
    reached = {}
    for dtype in (torch.float32, torch.bfloat16):
        runs = [
            Training(seed, dtype=dtype, dependence_measure=measure).run(500) for seed in range(3)
        ]
        assert all(torch.isfinite(losses).all() for losses in runs)
        reached[dtype] = torch.stack([tail(losses) for losses in runs])
        started = torch.stack([losses[:5].double().mean() for losses in runs])
        assert (reached[dtype] < started - 0.3).all()
    difference = (reached[torch.bfloat16].mean() - reached[torch.float32].mean()).abs()
    spread = torch.stack([values.std() for values in reached.values()]).mean()
    print(f"{measure}: {reached}, difference {difference:.4f}, spread {spread:.4f}")
    assert difference < 2 * spread + 0.01

"""Whole trainings in half, single and double precision."""

from __future__ import annotations

import json

import pytest
import torch

from tests.trust import precision
from tests.trust.__main__ import main
from tests.trust.precision import tail
from tests.trust.training import Training

HALF = [torch.bfloat16, torch.float16]


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
@pytest.mark.parametrize("measure", precision.MEASURES)
def test_five_hundred_steps_in_bf16_reach_float32(measure):
    """Over three seeds, the difference of the means is below the spread over seeds."""
    figures, faults = precision.compare(measure, 500)
    print(f"{measure}: {figures}")
    assert faults == []


def test_command(tmp_path, monkeypatch, capsys):
    """Ten steps tell of a training that has not come far, and are recorded."""
    monkeypatch.setattr(precision, "MEASURES", ("hsic",))
    monkeypatch.setattr(precision, "SEEDS", 2)
    assert main(["precision", "--steps", "10", "--output", str(tmp_path / "precision.json")]) == 1
    record = json.loads((tmp_path / "precision.json").read_text())
    found = record["figures"]["measures"]["hsic"]
    assert [len(found[name]["reached"]) for name in precision.PRECISIONS] == [2, 2]
    assert found["difference"] == abs(found["bfloat16"]["mean"] - found["float32"]["mean"])
    assert record["figures"]["faults"]
    assert "FAULT: hsic, bfloat16, seed 1: from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("worse", "said"), [(0.02, ""), (0.05, "elsewhere"), (float("nan"), "not finite")]
)
def test_a_precision_that_ends_elsewhere_is_a_fault(monkeypatch, worse, said):
    class Invented:
        def __init__(self, seed, *, dtype, dependence_measure):
            self.end = 0.2 + 0.01 * seed + (worse if dtype == torch.bfloat16 else 0.0)

        def run(self, steps):
            return torch.cat([torch.ones(steps - steps // 5), torch.full((steps // 5,), self.end)])

    monkeypatch.setattr(precision, "Training", Invented)
    faults = precision.compare("hsic", 50)[1]
    assert bool(faults) == bool(said)
    assert said in "".join(faults)

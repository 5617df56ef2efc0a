"""Same seed, same numbers: bit for bit, also after a checkpoint, and in torch's deterministic mode."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mvmr_loss import DistillationLoss, MVMRLoss, Representations, list_representations
from mvmr_loss.dependence import list_dependence_measures
from tests.trust.training import SAMPLES, Training

EVERY = ("pixels", "augmented_pixels", "scattering", "hog", "local_std", "dct")


@pytest.fixture
def deterministic(request):
    """Torch raises where it has no deterministic way, and fills new memory with NaN."""
    torch.use_deterministic_algorithms(getattr(request, "param", True))
    yield
    torch.use_deterministic_algorithms(False)


def test_same_seed_same_numbers():
    one, other = (Training(names=EVERY) for _ in range(2))
    assert torch.equal(run_from(one, 3), run_from(other, 3))
    for p, q in zip(one.head.parameters(), other.head.parameters(), strict=True):
        assert torch.equal(p, q)


def run_from(training, steps, seed=1):
    torch.manual_seed(seed)
    return training.run(steps)


@pytest.mark.slow
def test_same_numbers_in_another_process():
    """Sets and whatever else is ordered by hashes have another order there."""
    code = (
        "from tests.trust.test_determinism import EVERY, Training, run_from, torch\n"
        "torch.set_num_threads(1)\n"
        "print(hash('order'), run_from(Training(names=EVERY), 2).tolist())"
    )
    said = []
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        said.append(found.stdout.strip().split(" ", 1))
    assert said[0][0] != said[1][0]
    assert said[0][1] == said[1][1]


@pytest.mark.parametrize("deterministic", [False, True], indirect=True, ids=["", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers_after_a_checkpoint(dtype, deterministic, tmp_path):
    whole = run_from(Training(names=EVERY, dtype=dtype), 6)
    first = Training(names=EVERY, dtype=dtype)
    run_from(first, 3)
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    # Another process: other parameters, other random numbers, until the checkpoint is loaded.
    resumed = Training(seed=99, names=EVERY, dtype=dtype)
    resumed.run(1)
    resumed.load(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert torch.equal(resumed.run(3), whole[3:])


class Distillation:
    """A student, distilled from two teachers with a bank of anchors; drawn from a seed."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.student = nn.Linear(12, 8)
        self.loss = DistillationLoss(
            8, {"a": 6, "b": 5}, dependence_weight=0.5, hidden_dim=7, scale="coordinate", anchors=20
        )
        parameters = [*self.student.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def run(self, steps):
        losses = []
        for _ in range(steps):
            x = torch.randn(16, 12)
            teachers = {"a": x[:, :6].sin(), "b": x[:, 7:].square()}
            views = [self.student(x), self.student(x + 0.1 * torch.randn_like(x))]
            loss = self.loss(views, teachers)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.loss.update([z.detach() for z in views], teachers)
            losses.append(loss.detach())
        return torch.stack(losses)

    def parts(self):
        return {"student": self.student, "loss": self.loss, "optimizer": self.optimizer}


@pytest.mark.parametrize("deterministic", [False, True], indirect=True, ids=["", "deterministic"])
@pytest.mark.parametrize("steps", [1, 3])
def test_distillation_after_a_checkpoint(steps, deterministic, tmp_path):
    """Before the bank is full and after; what the features were standardised by goes on as well."""
    whole = run_from(Distillation(), 6)
    first = Distillation()
    run_from(first, steps)
    state = {name: part.state_dict() for name, part in first.parts().items()}
    torch.save({**state, "random": torch.get_rng_state()}, tmp_path / "checkpoint.pt")
    resumed = Distillation(seed=99)
    resumed.run(2)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, part in resumed.parts().items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    assert torch.equal(resumed.run(6 - steps), whole[steps:])
    # Without the bank's samples it is another loss.
    other = Distillation()
    other.loss.load_state_dict(state["loss"])
    other.loss.bank.update(torch.randn(4, 8), {"a": torch.randn(4, 6), "b": torch.randn(4, 5)})
    other.student.load_state_dict(state["student"])
    torch.set_rng_state(state["random"])
    assert not torch.equal(other.run(1), whole[steps : steps + 1])


def test_same_numbers_from_a_copy():
    training = Training(names=EVERY)
    run_from(training, 1)
    other = copy.deepcopy(training)
    assert torch.equal(run_from(training, 2), run_from(other, 2))


def test_deterministic_mode(deterministic):
    losses = [run_from(Training(names=EVERY, representation_views="both"), 3) for _ in range(2)]
    assert torch.isfinite(losses[0]).all()
    assert torch.equal(*losses)


BUILT_IN = [
    {"name": name, **more}
    for name in list_dependence_measures()
    for more in ({}, {"block_size": 5})
    if "block_size" not in more or "distance_correlation" in name
]


@pytest.mark.parametrize("measure", BUILT_IN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_measure_in_deterministic_mode(measure, dtype, deterministic):
    """New memory is NaN here: nothing is read that was not written."""
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        z, v = (torch.randn(24, 40, generator=generator).to(dtype).requires_grad_() for _ in "zv")
        y = {"y": torch.randn(24, 9, generator=generator)}
        loss = MVMRLoss(dependence_measure=measure)(z, v, y)
        loss.backward()
        results.append((loss.detach(), z.grad, v.grad))
    for one, other in zip(*results, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("sketch_dim", [None, 50])
@pytest.mark.parametrize("differentiable", [False, True])
def test_every_representation_in_deterministic_mode(sketch_dim, differentiable, deterministic):
    names = [n for n in list_representations() if n in (*EVERY, "patch_scattering")]
    assert len(names) == 7
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        x = torch.randn(5, 3, 32, 32, requires_grad=differentiable)
        representations = Representations(
            names, sketch_dim=sketch_dim, differentiable=differentiable, slice_size=2
        )
        features = representations(x)
        assert all(torch.isfinite(y).all() for y in features.values())
        if differentiable:
            sum(y.sum() for y in features.values()).backward()
            features["gradient"] = x.grad
        results.append(features)
    for name, values in results[0].items():
        assert torch.equal(values, results[1][name]), name


def test_local_binary_patterns_in_deterministic_mode(deterministic):
    x = torch.randn(5, 3, 32, 32)
    features = [Representations(["local_binary_patterns"], slice_size=2)(x) for _ in range(2)]
    assert torch.equal(*(f["local_binary_patterns"] for f in features))


def test_reading_a_store_is_the_same_after_resume(tmp_path):
    """Rows come from the store in both epochs, so that a resumed run meets the same features."""
    x = Training().images
    cache = {"path": tmp_path, "num_samples": SAMPLES}
    first, again = (
        Representations(["pixels", "hog"], sketch_dim=64, cache=cache) for _ in range(2)
    )
    computed = first(x, range(SAMPLES))
    again.load_state_dict(first.state_dict())
    for name, values in again(x, range(SAMPLES)).items():
        assert torch.equal(values, computed[name])


def test_heads_and_loss_keep_their_state_plain():
    """State dicts hold tensors alone, so that they load with weights_only=True."""
    training = Training(names=EVERY)
    for part in training.parts().values():
        if isinstance(part, nn.Module):
            assert all(isinstance(value, torch.Tensor) for value in part.state_dict().values())
    assert "samples_drawn" in " ".join(training.representations.state_dict())

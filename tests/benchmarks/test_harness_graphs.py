"""Steps that a GPU repeats as one graph: which calls are made in which order, without a GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import RepeatedStep
from benchmarks.harness.graphs import repeatable_adam


@pytest.fixture
def made(monkeypatch):
    """What was called of torch.cuda."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    class Stream:
        def wait_stream(self, other):
            calls.append("wait")

    def graph(graph):
        calls.append("capture")
        return nullcontext()

    stub = SimpleNamespace(
        CUDAGraph=Graph,
        Stream=Stream,
        current_stream=Stream,
        stream=lambda stream: nullcontext(),
        graph=graph,
    )
    monkeypatch.setattr(torch, "cuda", stub)
    return calls


def test_three_steps_then_a_graph(made):
    step = RepeatedStep(lambda: made.append("step"), "cuda")
    for _ in range(3):
        step()
    assert made == ["wait", "step", "wait"] * 3
    made.clear()
    step()
    assert made == ["capture", "step", "replay"]  # a capture computes nothing
    step()
    assert made[3:] == ["replay"]


def test_on_a_cpu_and_where_nothing_can_be_captured_the_step_is_called(made):
    for step in (
        RepeatedStep(lambda: made.append("step"), "cpu"),
        RepeatedStep(lambda: made.append("step"), "cuda", captured=False),
    ):
        made.clear()
        for _ in range(5):
            step()
        assert made == ["step"] * 5


def test_adam_is_the_ordinary_one_on_a_cpu():
    parameters = [torch.nn.Parameter(torch.ones(2))], [torch.nn.Parameter(torch.ones(2))]
    ours = repeatable_adam(parameters[0], 0.1, 0.01, "cpu")
    torchs = torch.optim.Adam(parameters[1], lr=0.1, weight_decay=0.01)
    for optimizer, (parameter,) in zip((ours, torchs), parameters, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(parameters[0][0], parameters[1][0])
    assert not ours.defaults["capturable"]

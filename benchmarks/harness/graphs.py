"""Steps of a training repeated on a GPU as one CUDA graph, which costs no launches from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


class RepeatedStep:
    """Repeats a step of a training; on a GPU, after three times, as one graph.

    The step must read and write the same tensors each time: its batch is in a tensor that is filled
    anew, gradients are set to None at its beginning, the optimiser is capturable. Nothing in it may
    wait for the GPU. Its random numbers are others each time, as without a graph.

    Args:
        step: Takes and returns nothing.
        device: Where it computes; on a CPU it is called as it is.
        captured: Whether to make a graph of it.

    Examples:
        >>> count = torch.zeros(())
        >>> step = RepeatedStep(lambda: count.add_(1), "cpu")
        >>> for _ in range(5):
        ...     step()
        >>> count
        tensor(5.)
    """

    WARMUP = 3

    def __init__(
        self, step: Callable[[], object], device: torch.device | str, *, captured: bool = True
    ) -> None:
        self.step = step
        self.captured = captured and torch.device(device).type == "cuda"
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Takes a step."""
        self.calls += 1
        if not self.captured:
            self.step()
        elif self.calls <= self.WARMUP:
            # On a stream of its own, as torch asks of what is to be captured.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.step()
            self.graph.replay()


def repeatable_adam(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    device: torch.device | str,
) -> torch.optim.Adam:
    """Returns Adam for a :class:`RepeatedStep`: on a GPU the learning rate is a tensor there."""
    captured = torch.device(device).type == "cuda"
    rate = torch.tensor(learning_rate, device=device) if captured else learning_rate
    return torch.optim.Adam(
        parameters, lr=rate, weight_decay=weight_decay, foreach=True, capturable=captured
    )

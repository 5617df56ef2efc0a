"""What the property tests draw, and how often."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# A change is judged on the same cases as the one before it. For "new" the conftest draws the seed, and
# pytest's header tells it.
SEED = int(os.environ.get("MVMR_PROPERTY_SEED", "0"))
# hypothesis also draws numbers that stand in the source of the modules that are loaded: by them the
# cases would be others after any change, and in each process that had run other tests before.
try:
    from hypothesis.internal.conjecture.providers import Constants, HypothesisProvider
except ImportError:  # an older hypothesis, which does not
    pass
else:
    HypothesisProvider._local_constants = Constants()  # type: ignore[assignment]
# A failure is made smaller, unless that it fails is all that is asked.
_PHASES = [p for p in Phase if p != Phase.shrink or "MVMR_PROPERTY_AS_DRAWN" not in os.environ]
# How many cases the large runs draw, by test.
DRAWN: dict[str, int] = {}

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = (
    *(
        "plain",
        "plain",
        "zero",
        "constant",
        "duplicates",
        "clusters",
        "outlier",
        "collapse",
        "line",
    ),
    *("ties", "offset", "one hot", "two samples", "simplex"),
)
LAYOUTS = ("plain", "plain", "transposed", "columns", "rows", "flipped", "negated", "3d")


def cases(
    short: int | None,
    large: int,
    *,
    examples: Sequence[Mapping[str, Any]] = (),
    reached: float = 0.0,
    **strategies: Any,
) -> Callable[[Callable[..., bool | None]], Any]:
    """Makes a test of a property: a few cases, and slowly many.

    Args:
        short: How many cases by default; None for a test that is slow with the first one.
        large: How many in the slow run.
        examples: Cases that are tried first, each time: found ones.
        reached: Which part of the cases must have been of what the test is about: the check returns
            whether one was.
        **strategies: What to draw, by the name of the argument.

    Returns:
        A decorator.
    """

    def decorate(check: Callable[..., bool | None]) -> Any:
        DRAWN[f"{check.__module__}.{check.__name__}"] = large
        counts = [pytest.param(large, marks=pytest.mark.slow)]

        @pytest.mark.parametrize("count", counts if short is None else [short, *counts])
        def test(count: int) -> None:
            seed = SEED if count == large else 0
            print(f"MVMR_PROPERTY_SEED={seed}")
            found = []

            @functools.wraps(check)
            def noted(**drawn: Any) -> None:
                found.append(bool(check(**drawn)))

            given = hypothesis.given(**strategies)(noted)
            for example in examples:
                given = hypothesis.example(**example)(given)
            run = settings(
                max_examples=count,
                deadline=None,
                database=None,
                print_blob=True,
                phases=_PHASES,
                suppress_health_check=list(HealthCheck),
            )(hypothesis.seed(seed)(given))
            run()
            assert sum(found) >= reached * len(found), f"{sum(found)} of {len(found)} cases"

        test.__doc__ = check.__doc__
        return test

    return decorate


@dataclass(frozen=True)
class Batch:
    """How a batch of shape (n, d) is made; a failure prints it."""

    kind: str
    n: int
    d: int
    size: int
    seed: int
    dtype: torch.dtype
    layout: str

    def numbers(self) -> torch.Tensor:
        """Returns the numbers in the dtype, contiguous."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.n, self.d, generator=generator, dtype=torch.float64)
        if self.kind == "zero":
            x = x * 0
        elif self.kind == "constant":
            x = x[:1].repeat(self.n, 1)
        elif self.kind == "duplicates":
            x = x[torch.arange(self.n) // 2]
        elif self.kind == "clusters":
            centers = torch.randn(2, self.d, generator=generator, dtype=torch.float64)
            x = centers[torch.arange(self.n) % 2] + 1e-3 * x
        elif self.kind == "outlier":
            x[self.seed % self.n] *= 1e5
        elif self.kind == "collapse":
            x = x[:1] + 1e-6 * x
        elif self.kind == "line":
            x = torch.arange(self.n)[:, None] * x[:1]
        elif self.kind == "ties":
            x = x.round()
        elif self.kind == "offset":
            x = x + 100
        elif self.kind == "one hot":
            x = (torch.arange(self.n)[:, None] % self.d == torch.arange(self.d)).double()
        elif self.kind == "two samples":
            x[2:] = x[1:2]
        elif self.kind == "simplex":
            x = torch.eye(self.n, dtype=torch.float64)
        most = torch.finfo(self.dtype).max
        return (x * 10.0**self.size).clamp(-most, most).to(self.dtype)

    def tensor(self, *, requires_grad: bool = False) -> torch.Tensor:
        """Returns the same numbers as a leaf of the drawn layout."""
        x = self.numbers()
        n, d = x.shape
        if self.layout == "transposed":
            x = x.T.contiguous().T
        elif self.layout == "columns":
            x = torch.stack([x, x + 1], dim=2).flatten(1)[:, ::2]
        elif self.layout == "rows":
            x = torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2]
        elif self.layout == "flipped":
            x = x.flip(0).contiguous().flip(0)
        elif self.layout == "negated":
            x = torch._neg_view(-x)
        elif self.layout == "3d":
            x = x[:, :, None].expand(n, d, 1)
        return x.detach().requires_grad_(requires_grad)


_SAMPLES, _SIZES, _WIDTHS = st.integers(2, 12), st.integers(-20, 20), st.integers(1, 20)


def batches(
    n: Any = _SAMPLES,
    *,
    sizes: Any = _SIZES,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kinds: tuple[str, ...] = KINDS,
    widths: Any = _WIDTHS,
    layouts: tuple[str, ...] = LAYOUTS,
) -> Any:
    """Draws batches."""
    return st.builds(
        Batch,
        kind=st.sampled_from(kinds),
        n=n,
        d=widths,
        size=sizes,
        seed=st.integers(0, 2**20),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(layouts),
    )


@st.composite
def several(draw: Any, count: Any, least: int = 2, most: int = 12, **options: Any) -> list[Batch]:
    """Draws batches of one number of samples."""
    n = st.just(draw(st.integers(least, most)))
    return [draw(batches(n, **options)) for _ in range(draw(count))]


def with_gradient(function: Callable[..., torch.Tensor], *drawn: Batch) -> tuple[Any, Any]:
    """Returns a function's value and its gradients."""
    tensors = [b.tensor(requires_grad=True) for b in drawn]
    value = function(*tensors)
    return value, torch.autograd.grad(value, tensors)


def finite_gradients(function: Callable[..., torch.Tensor], tensors: list[Any]) -> list[Any]:
    """Returns a function's gradients after checking that they are finite, or None where unused.

    One may be infinite where that of the same numbers in a wider type is beyond its range: in float16 it
    is what a GradScaler looks for.
    """
    value = function(*tensors)
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    exact: Any = None
    for i, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
        if gradient is None:
            continue
        assert gradient.dtype == tensor.dtype
        assert gradient.shape == tensor.shape
        finite = torch.isfinite(gradient)
        if tensor.dtype != torch.float64 and not finite.all():
            if exact is None:
                wider = {torch.float32: torch.float64, torch.float64: torch.float64}
                raised = [
                    t.detach().to(wider.get(t.dtype, torch.float32)).requires_grad_()
                    for t in tensors
                ]
                exact = torch.autograd.grad(function(*raised), raised, allow_unused=True)
            finite |= exact[i].abs() > 0.9 * torch.finfo(tensor.dtype).max
        assert finite.all(), gradient
    return list(gradients)

"""``Scattering2D`` against kymatio's own, whose top-level import fails with SciPy >= 1.17."""

import pytest
import torch
from kymatio.scattering2d.backend.torch_backend import backend
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

from mvmr_loss.representations import Scattering2D

SETTINGS = [
    {"J": 2, "shape": (32, 32)},
    {"J": 2, "shape": (17, 40), "L": 4},
    {"J": 3, "shape": (24, 50), "L": 6, "max_order": 1},
    {"J": 2, "shape": (32, 28), "L": 4, "pre_pad": True},
    {"J": 1, "shape": (9, 12), "L": 3, "pre_pad": True},
]
every_setting = pytest.mark.parametrize("options", SETTINGS, ids=str)


def image(*leading, options, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    height, width = options["shape"]
    if options.get("pre_pad"):
        step = 2 ** options["J"]
        height, width = (step * (size // step + 2) for size in (height, width))
    return torch.rand(*leading, height, width, generator=generator, dtype=dtype)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@every_setting
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 2)], ids=str)
def test_equals_kymatio(options, leading):
    x = image(*leading, options=options)
    assert_close(Scattering2D(**options)(x), ScatteringTorch2D(**options, backend=backend)(x))


@every_setting
def test_a_list_equals_kymatios(options):
    x = image(2, options=options)
    expected = ScatteringTorch2D(**options, backend=backend, out_type="list")(x)
    paths = Scattering2D(**options, out_type="list").scattering(x)
    assert len(paths) == len(expected)
    for path, other in zip(paths, expected, strict=True):
        assert_close(path.pop("coef"), other.pop("coef"))
        assert path == other


@pytest.mark.parametrize("pre_pad", [False, True])
def test_gradient_equals_kymatios(pre_pad):
    options = {"J": 2, "shape": (16, 16), "L": 4, "pre_pad": pre_pad}
    gradients = []
    for module in (Scattering2D(**options), ScatteringTorch2D(**options, backend=backend)):
        x = image(2, options=options).requires_grad_()
        module(x).square().sum().backward()
        gradients.append(x.grad)
    assert_close(*gradients)


@pytest.mark.parametrize("pre_pad", [False, True])
def test_what_kymatio_refuses(pre_pad):
    options = {"J": 1, "shape": (8, 8), "L": 2, "pre_pad": pre_pad}
    module = Scattering2D(**options)
    x = image(3, options=options, dtype=torch.float64)
    whole = module(x)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(module(x.mT.contiguous().mT), whole)
    torch.testing.assert_close(module(x.half()), module(x.half().float()))


def test_checkpoints_of_kymatio_are_loaded_and_hold_nothing_here():
    before = torch.nn.Sequential(
        ScatteringTorch2D(1, (8, 8), backend=backend), torch.nn.Linear(4, 2)
    )
    after = torch.nn.Sequential(Scattering2D(1, (8, 8)), torch.nn.Linear(4, 2))
    assert "0.tensor0" in before.state_dict()
    after.load_state_dict(before.state_dict())
    assert list(after.state_dict()) == ["1.weight", "1.bias"]
    torch.testing.assert_close(after[1].weight, before[1].weight)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.tensors"):
        after.load_state_dict({**after.state_dict(), "0.tensors": torch.ones(1)})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"J": 0}, ValueError, "J must be at least 1 but is 0"),
        ({"shape": 32}, ValueError, r"shape must be \(height, width\) but is 32"),
        ({"shape": (32, 2.5)}, TypeError, "shape must be an int but is a float"),
        ({"shape": (32, 3)}, ValueError, "shape must be at least 4 x 4 pixels.*32 x 3"),
        ({"max_order": 3}, ValueError, "max_order must be"),
        ({"pre_pad": 1}, TypeError, "pre_pad must be"),
        ({"out_type": "dict"}, ValueError, "out_type must be.*'dict'"),
    ],
)
def test_errors_of_options(options, error, match):
    with pytest.raises(error, match=match):
        Scattering2D(**{"J": 2, "shape": (32, 32), **options})


def test_errors_of_input():
    module = Scattering2D(2, (32, 28))
    with pytest.raises(
        ValueError, match=r"x must have shape \(..., 32, 28\) but has \(2, 28, 32\)"
    ):
        module(torch.rand(2, 28, 32))
    for options in ({}, {"pre_pad": True}):
        named = Scattering2D(2, (32, 28), **options)
        size = image(1, options={"J": 2, "shape": (32, 28), **options}).shape[-2:]
        with pytest.raises(ValueError, match="x must be finite"):
            named(torch.full((2, *size), float("nan")))
        with pytest.raises(ValueError, match=r"x must not be empty but has shape \(0, "):
            named(torch.rand(0, *size))
    with pytest.raises(TypeError, match="x must be a torch.Tensor but is a list"):
        module([1.0])
    with pytest.raises(ValueError, match=r"\(..., 40, 36\), padded already, but has \(32, 28\)"):
        Scattering2D(2, (32, 28), pre_pad=True)(torch.rand(32, 28))
    with pytest.raises(ValueError, match="must be finite"):
        module(torch.full((32, 28), torch.nan))

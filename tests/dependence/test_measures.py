"""What holds for every dependence measure, whatever it computes."""

import functools

import pytest
import torch
from torch import nn

from mvmr_loss.dependence import (
    DependenceMeasure,
    cka,
    dependence_measure,
    distance_correlation,
    distance_correlation_sqr,
    distance_covariance,
    distance_covariance_sqr,
    hsic,
    list_dependence_measures,
    pairwise_distances,
    partial_distance_correlation,
    register_dependence_measure,
    registry,
    u_distance_correlation_sqr,
    u_distance_covariance_sqr,
)

MEASURES = {
    "distance_correlation": (dependence_measure("distance_correlation"), distance_correlation),
    "distance_correlation_sqr": (
        dependence_measure("distance_correlation_sqr"),
        distance_correlation_sqr,
    ),
    "u_distance_correlation_sqr": (
        dependence_measure("u_distance_correlation_sqr"),
        u_distance_correlation_sqr,
    ),
    "distance_covariance": (dependence_measure("distance_covariance"), distance_covariance),
    "distance_covariance_sqr": (
        dependence_measure("distance_covariance_sqr"),
        distance_covariance_sqr,
    ),
    "u_distance_covariance_sqr": (
        dependence_measure("u_distance_covariance_sqr"),
        u_distance_covariance_sqr,
    ),
    "hsic": (dependence_measure("hsic"), hsic),
    "unbiased_hsic": (dependence_measure("unbiased_hsic"), lambda x, y: hsic(x, y, unbiased=True)),
    "hsic_linear": (
        dependence_measure("hsic", kernel="linear"),
        lambda x, y: hsic(x, y, kernel="linear"),
    ),
    "hsic_bandwidth": (
        dependence_measure("hsic", bandwidth=2.0),
        lambda x, y: hsic(x, y, bandwidth=2.0),
    ),
    "cka": (dependence_measure("cka"), cka),
    "debiased_cka": (dependence_measure("debiased_cka"), lambda x, y: cka(x, y, debiased=True)),
    "cka_gaussian": (
        dependence_measure("cka", kernel="gaussian"),
        lambda x, y: cka(x, y, kernel="gaussian"),
    ),
}
CORRELATIONS = [name for name in MEASURES if "correlation" in name or "cka" in name]
CORRECTED = [name for name in MEASURES if MEASURES[name][0].min_samples == 4]
NAMED = [name for name in MEASURES if name not in ("hsic_linear", "hsic_bandwidth", "cka_gaussian")]

every_measure = pytest.mark.parametrize("name", MEASURES)
every_correlation = pytest.mark.parametrize("name", CORRELATIONS)


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def related(n: int, d: int, e: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Two batches that depend on each other, so that no measure is near its zero."""
    x = batch(n, d)
    y = torch.cat([x.square()[:, : e // 2], x[:, : e - e // 2]], 1) + 0.1 * batch(n, e, seed=1)
    return [x.to(dtype), y.to(dtype)]


def assert_finite(value: torch.Tensor, *inputs: torch.Tensor) -> None:
    assert torch.isfinite(value), value
    for x, grad in zip(inputs, torch.autograd.grad(value, inputs), strict=True):
        assert grad.shape == x.shape
        assert torch.isfinite(grad).all()


@every_measure
@pytest.mark.parametrize(
    ("shape", "other"), [((8, 5), (8, 3)), ((8, 2, 3, 4), (8, 1)), ((8,), (8, 2))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoke(name, shape, other, dtype):
    measure, function = MEASURES[name]
    x, y = batch(*shape, dtype=dtype), batch(*other, seed=1, dtype=dtype)
    value = measure(x, y)
    assert value.shape == ()
    assert value.dtype == dtype
    torch.testing.assert_close(value, function(x, y))
    assert repr(measure).startswith(type(measure).__name__)


@every_measure
@pytest.mark.parametrize("n", range(1, 6))
def test_cardinality(name, n):
    measure, function = MEASURES[name]
    x, y = related(n, 4, 3)
    if n < measure.min_samples:
        expected = (
            rf"x must have at least {measure.min_samples} samples .* but has {n}; use a larger"
        )
        with pytest.raises(ValueError, match=expected):
            measure(x, y)
        with pytest.raises(ValueError, match=expected):
            function(x, y)
    else:
        assert_finite(measure(x.requires_grad_(), y.requires_grad_()), x, y)


@every_measure
def test_exception(name):
    measure, function = MEASURES[name]
    x = batch(8, 4)
    for call in (measure, function):
        with pytest.raises(
            ValueError, match="x and y must have the same number of samples but have 8"
        ):
            call(x, batch(7, 4))
        with pytest.raises(TypeError, match=r"y must be a torch\.Tensor but is a list"):
            call(x, x.tolist())
        with pytest.raises(
            TypeError, match="x must have a floating-point dtype but has torch.int64"
        ):
            call(x.long(), x)
        with pytest.raises(ValueError, match=r"y must have shape \(N, D\).*but has shape \(8, 0\)"):
            call(x, batch(8, 0))
        with pytest.raises(ValueError, match=r"x must have shape .*but has shape \(\)"):
            call(torch.tensor(1.0), x)
        for bad in (float("nan"), float("inf")):
            wrong = x.clone()
            wrong[3, 2] = bad
            with pytest.raises(ValueError, match="y must be finite but holds NaN or infinite"):
                call(x, wrong)


@every_measure
def test_not_looked_at_gives_nan(name, monkeypatch):
    monkeypatch.setattr("mvmr_loss.dependence.measures.check_finite", lambda name, x: None)
    x, y = related(8, 4, 3)
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong = x.clone()
        wrong[3, 2] = bad
        assert MEASURES[name][0](wrong, y).isnan()


@pytest.mark.parametrize(
    "call",
    [
        functools.partial(dependence_measure, "distance_correlation"),
        functools.partial(partial_distance_correlation, *[batch(8, 2)] * 3),
        functools.partial(pairwise_distances, batch(8, 2)),
    ],
)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"exponent": 0.0},
            ValueError,
            "exponent must be finite and above 0 and below 2 but is 0.0",
        ),
        ({"exponent": 2}, ValueError, "exponent must be finite and above 0 and below 2 but is 2"),
        ({"exponent": float("nan")}, ValueError, "exponent must be finite and above 0"),
        ({"exponent": "1"}, TypeError, "exponent must be a number but is a str"),
        ({"exponent": [1.0]}, TypeError, "exponent must be a number but is a list"),
        ({"eps": [0.0]}, TypeError, "eps must be a number but is a list"),
        ({"eps": -1.0}, ValueError, r"eps must be finite and at least 0 but is -1\.0"),
        ({"eps": float("inf")}, ValueError, "eps must be finite"),
    ],
)
def test_distance_options(call, options, error, match):
    with pytest.raises(error, match=match):
        call(**options)


@pytest.mark.parametrize(
    "call",
    [
        functools.partial(dependence_measure, "hsic"),
        functools.partial(dependence_measure, "debiased_cka"),
        functools.partial(cka, *[batch(8, 2)] * 2),
    ],
)
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"kernel": "cubic"},
            ValueError,
            "kernel must be one of 'linear', 'gaussian' but is 'cubic'",
        ),
        (
            {"kernel": "gaussian", "bandwidth": 0},
            ValueError,
            "bandwidth must be finite and above 0",
        ),
        ({"kernel": "gaussian", "bandwidth": "1"}, TypeError, "bandwidth must be a number"),
        (
            {"kernel": "linear", "bandwidth": 1.0},
            ValueError,
            "bandwidth must be None for the linear",
        ),
    ],
)
def test_kernel_options(call, options, error, match):
    with pytest.raises(error, match=match):
        call(**options)


@pytest.mark.parametrize("name", NAMED)
def test_names(name):
    measure = dependence_measure(name)
    assert isinstance(measure, DependenceMeasure)
    x, y = related(8, 4, 3)
    torch.testing.assert_close(measure(x, y), MEASURES[name][1](x, y))
    assert dependence_measure(measure) is measure


@pytest.mark.parametrize("name", [name for name in NAMED if "distance" in name])
@pytest.mark.parametrize("options", [{"exponent": 0.5}, {"eps": 4.0}])
def test_functions_take_the_options_of_their_names(name, options):
    x, y = related(8, 4, 3)
    measure, function = MEASURES[name]
    value = function(x, y, **options)
    torch.testing.assert_close(value, dependence_measure(name, **options)(x, y))
    assert (value - function(x, y)).abs() > 1e-3 * value.abs()


@pytest.mark.parametrize(
    "name", ["distance_correlation", "u_distance_covariance_sqr", "debiased_cka"]
)
def test_vmap(name):
    xs, ys = batch(3, 8, 4), batch(3, 8, 2, seed=1)
    measure = dependence_measure(name)
    expected = torch.stack([measure(x, y) for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(torch.vmap(measure)(xs, ys), expected)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.ones(4, 0), r"^x must have shape \(N, D\)"),
        (torch.tensor([[0.0], [float("nan")]]), "^x must be finite"),
    ],
)
def test_exception_pairwise_distances(x, match):
    with pytest.raises(ValueError, match=match):
        pairwise_distances(x)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_exception_partial(place):
    for wrong, match in (
        (torch.full((8, 2), float("inf"), dtype=torch.float64), "must be finite"),
        (batch(3, 2), "must have at least 4 samples"),
    ):
        given = [wrong if i == place else batch(8, 2, seed=i) for i in range(3)]
        with pytest.raises(ValueError, match=f"^{'xyz'[place]} {match}"):
            partial_distance_correlation(*given)


class TestRegistering:
    @pytest.fixture(autouse=True)
    def _own_registry(self, monkeypatch):
        monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    def test_a_measure_with_any_options(self):
        @register_dependence_measure("own")
        class Own(DependenceMeasure):
            def __init__(self, **options):
                super().__init__()
                self.options = options

        assert list_dependence_measures()[-1] == "own"
        assert dependence_measure("own", size=3).options == {"size": 3}
        given = {"name": "own", "size": 3, "other": 1}
        assert dependence_measure(given, other=2).options == {"size": 3, "other": 2}
        assert given == {"name": "own", "size": 3, "other": 1}
        # Defined again, as in a notebook, it takes its own place.
        assert register_dependence_measure("own")(Own) is Own

    @pytest.mark.parametrize("name", ["", None, 3])
    def test_exception_name(self, name):
        with pytest.raises(ValueError, match="name must be a non-empty string but is"):
            register_dependence_measure(name)

    def test_exception_taken(self):
        def build():
            raise AssertionError

        with pytest.raises(ValueError, match="name must be free but 'hsic' is taken"):
            register_dependence_measure("hsic")(build)
        assert dependence_measure("hsic").name == "hsic"

    def test_exception_options(self):
        measure = dependence_measure("hsic")
        with pytest.raises(TypeError, match=r"options must be of a name but .*\(hsic.* already"):
            dependence_measure(measure, bandwidth=2.0)
        with pytest.raises(
            TypeError, match="hsic has no option 'eps'; its options are kernel, bandwidth"
        ):
            dependence_measure("hsic", eps=1.0)
        register_dependence_measure("plain")(lambda: measure)
        assert dependence_measure("plain") is measure
        with pytest.raises(TypeError, match="plain has no option 'eps'; its options are none"):
            dependence_measure("plain", eps=1.0)
        with pytest.raises(
            TypeError, match=r"a mapping with a 'name'.* but is .'exponent': 1.0.\."
        ):
            dependence_measure({"exponent": 1.0})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("distance_correlation", "distance_correlation, exponent=1.0, eps=0.0"),
        ("u_distance_covariance_sqr", "u_distance_covariance_sqr, exponent=1.0, eps=0.0"),
        ("hsic", "hsic"),
        ("unbiased_hsic", "unbiased_hsic"),
        ("cka", "cka"),
        ("debiased_cka", "debiased_cka"),
    ],
)
def test_printing_tells_name_and_options(name, said):
    assert dependence_measure(name).extra_repr() == said
    if "distance" in name:
        assert dependence_measure(name, block_size=8).extra_repr() == f"{said}, block_size=8"


def test_unknown_names():
    with pytest.raises(
        ValueError, match="one of distance_correlation, .*debiased_cka but is 'dcor'"
    ):
        dependence_measure("dcor")
    with pytest.raises(
        TypeError, match="must be a name, a mapping with a .name., or a mvmr_loss.dependence"
    ):
        dependence_measure(nn.Identity())


@every_correlation
def test_self_dependence(name):
    x = batch(16, 5)
    assert MEASURES[name][0](x, x).item() == pytest.approx(1, abs=1e-12)


@every_measure
def test_invariance(name):
    measure = MEASURES[name][0]
    x, y = related(12, 6, 4)
    expected = measure(x, y)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    rotation, _ = torch.linalg.qr(batch(6, 6, seed=3))
    for other in (x @ rotation, x + 100 * batch(6, seed=4)):
        torch.testing.assert_close(measure(other, y), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(measure(x[order], y[order]), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(measure(y, x), expected, rtol=1e-10, atol=0)
    assert (measure(x[order], y) - expected).abs() > 1e-3 * expected.abs()
    if name in CORRELATIONS or name in ("hsic", "unbiased_hsic"):
        torch.testing.assert_close(measure(7.3 * x, y), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", CORRECTED)
def test_independent_data_give_about_zero(name):
    measure = MEASURES[name][0]
    values = torch.stack(
        [measure(batch(64, 200, seed=s), batch(64, 300, seed=s + 50)) for s in range(20)]
    )
    scale = measure(batch(64, 200), batch(64, 200))
    assert values.mean().abs() < 4 * values.std() / 20**0.5
    assert values.abs().max() < 0.1 * scale


@pytest.mark.parametrize(
    ("name", "level"),
    [("distance_correlation", 0.970), ("cka", 0.80), ("u_distance_correlation_sqr", 0)],
)
def test_chance_level_is_the_documented_one(name, level):
    x, y = batch(256, 1024, dtype=torch.float32), batch(256, 1024, seed=1, dtype=torch.float32)
    assert MEASURES[name][0](x, y).item() == pytest.approx(level, abs=0.012)


@every_measure
def test_gradcheck(name):
    x, y = (t.requires_grad_() for t in related(6, 3, 2))
    # The median heuristic lets no gradient through the bandwidth, so a difference quotient would
    # see another function: a bandwidth is given.
    measure = (
        dependence_measure("unbiased_hsic", bandwidth=2.0)
        if name == "unbiased_hsic"
        else MEASURES[name][0]
    )
    if name in ("hsic", "cka_gaussian"):
        measure = dependence_measure(measure.name, kernel="gaussian", bandwidth=1.5)
    assert torch.autograd.gradcheck(measure, (x, y))
    assert torch.autograd.gradgradcheck(measure, (x, y))


@pytest.mark.parametrize("options", [{"exponent": 0.5}, {"exponent": 1.5}, {"eps": 0.5}])
def test_gradcheck_options(options):
    x, y = (t.requires_grad_() for t in related(6, 3, 2))
    assert torch.autograd.gradcheck(dependence_measure("distance_correlation", **options), (x, y))


def test_gradcheck_partial():
    x, y = (t.requires_grad_() for t in related(6, 3, 2))
    z = batch(6, 2, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(partial_distance_correlation, (x, y, z))
    assert torch.autograd.gradgradcheck(partial_distance_correlation, (x, y, z))


@every_measure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [-1, 1])
def test_extreme_scales(name, dtype, scale):
    x, y = related(16, 8, 6, dtype)
    measure = MEASURES[name][0]
    factor = (1e30 if dtype == torch.float32 else 1e150) ** scale
    scaled = (factor * x).requires_grad_()
    value = measure(scaled, y)
    assert_finite(value, scaled)
    if name in CORRELATIONS or name in ("hsic", "unbiased_hsic"):
        rtol = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(value, measure(x, y), rtol=rtol, atol=0)
    assert_finite(measure(scaled, scaled), scaled)


@every_measure
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-34, 3e38])
def test_limits_of_float32(name, magnitude):
    x, y = related(16, 8, 6, torch.float32)
    x = (x / x.abs().max() * magnitude).requires_grad_()
    assert x.detach().abs().max() > 0
    assert_finite(MEASURES[name][0](x, y), x)


def degenerate(kind: str) -> torch.Tensor:
    x = batch(16, 8, dtype=torch.float32)
    if kind == "duplicates":
        x[5:9] = x[4]
    elif kind == "constant":
        x[:] = x[0]
    elif kind == "zero":
        x.zero_()
    elif kind == "collapsed":
        x = x[:1] + 1e-6 * x
    elif kind == "one outlier":
        x[1:] = 0.1
    elif kind == "huge outlier":
        x[0] = 1e30
    elif kind == "line":
        x = torch.arange(16.0)[:, None] * x[0]
    return x


@every_measure
@pytest.mark.parametrize(
    "kind", ["duplicates", "constant", "zero", "collapsed", "one outlier", "huge outlier", "line"]
)
def test_degenerate(name, kind):
    measure = MEASURES[name][0]
    x, y = degenerate(kind).requires_grad_(), batch(16, 6, dtype=torch.float32).requires_grad_()
    value = measure(x, y)
    assert_finite(value, x, y)
    assert_finite(measure(x, x), x)
    if kind in ("constant", "zero"):
        # A kernel matrix of a constant batch is centred to rounding; distances are exactly 0.
        atol = 1e-6 if name.startswith(("hsic", "unbiased_hsic")) else 0
        for t in (value, *torch.autograd.grad(measure(x, y), (x, y))):
            torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["distance_correlation", "u_distance_correlation_sqr", "cka"])
def test_wide_float32_is_accurate(name):
    x = batch(64, 140_000, dtype=torch.float32).relu_().add_(3)
    y = x[:, :128] @ batch(128, 256, seed=1, dtype=torch.float32)
    measure = MEASURES[name][0]
    value, expected = measure(x, y), measure(x.double(), y.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


@every_measure
def test_strides_do_not_matter(name):
    measure = MEASURES[name][0]
    x, y = related(8, 6, 6)
    expected = measure(x, y)
    torch.testing.assert_close(
        measure(x.T.contiguous().T, y[:, None].expand(8, 3, 6)[:, 1]), expected
    )
    padded = torch.zeros(8, 12, dtype=torch.float64)
    padded[:, ::2] = x
    torch.testing.assert_close(measure(padded[:, ::2], y), expected)
    repeated = x[:, :, None].expand(8, 6, 4)
    torch.testing.assert_close(measure(repeated, y), measure(repeated.contiguous(), y))


@every_measure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(name, dtype):
    measure = MEASURES[name][0]
    x, y = (t.to(dtype) for t in related(16, 8, 6))
    expected = measure(x.float(), y.float())
    assert expected.dtype == torch.float32
    torch.testing.assert_close(measure(x, y), expected)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = measure(x, y)
        torch.testing.assert_close(value, expected)
        (grad,) = torch.autograd.grad(value, x)
    assert grad.dtype == dtype
    assert torch.isfinite(grad).all()


@every_measure
def test_autocast_changes_nothing(name):
    measure = MEASURES[name][0]
    x, y = (t.requires_grad_() for t in related(16, 64, 6, torch.float32))
    expected = measure(x, y)
    expected_grad = torch.autograd.grad(expected, (x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = measure(x, y)
        grad = torch.autograd.grad(value, (x, y))
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)


# One of each way to center, and of the kernels; compiling takes seconds.
COMPILED = ("distance_correlation", "u_distance_correlation_sqr", "hsic")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in COMPILED else pytest.mark.slow) for n in MEASURES],
)
def test_compile(name):
    measure = MEASURES[name][0]
    compiled = torch.compile(measure, fullgraph=True, backend="aot_eager")
    for n in (8, 9):
        x, y = (t.requires_grad_() for t in related(n, 6, 4))
        value, expected = compiled(x, y), measure(x, y)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y))
        )
    assert compiled(x.detach() * float("nan"), y).isnan()


@pytest.mark.slow  # the loss with it is compiled so by default
def test_compile_inductor():
    compiled = torch.compile(distance_correlation, fullgraph=True)
    x, y = (t.requires_grad_() for t in related(16, 8, 6, torch.float32))
    value, expected = compiled(x, y), distance_correlation(x, y)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, (x, y)),
        torch.autograd.grad(expected, (x, y)),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(("function", "flag"), [(hsic, "unbiased"), (cka, "debiased")])
def test_flags_are_checked(function, flag):
    x = torch.randn(8, 3)
    with pytest.raises(TypeError, match=f"{flag} must be True or False but is 'no'"):
        function(x, x, **{flag: "no"})


def test_both_batches_are_on_one_device():
    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match="y must be on cpu like x but is on meta"):
        distance_correlation(x, x.to("meta"))


@pytest.mark.parametrize(
    ("value", "returned"), [(0.5, "float"), (torch.zeros(4), r"\(4,\)")], ids=["float", "vector"]
)
def test_what_a_measure_of_ones_own_returns(value, returned):
    class Constant(DependenceMeasure):
        def forward(self, x, y):
            return value

    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match=rf"Constant must return .* shape \(\) .* {returned}"):
        Constant().compare([x, x + 1], [(0, 1)])


def test_a_partial_can_be_registered_twice(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    build = functools.partial(dependence_measure, "cka")
    for _ in range(2):  # as in a notebook
        register_dependence_measure("my_cka")(build)
    assert "my_cka" in list_dependence_measures()


def test_float8_is_to_be_converted():
    x = torch.randn(8, 3).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="x must have 16 bits or more but has torch.float8_e4m3fn"):
        distance_correlation(x, x)


def test_a_mapping_without_a_name_is_told_as_it_was_given():
    with pytest.raises(TypeError, match=r"a 'name', .* but is \{'kernel': 'linear'\}"):
        dependence_measure({"kernel": "linear"})

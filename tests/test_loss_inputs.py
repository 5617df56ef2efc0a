"""Which input gets which gradient and type: each alone, in every precision."""

import itertools

import pytest
import torch

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss, _objective
from mvmr_loss.dependence import DependenceMeasure
from mvmr_loss.distributed import ALL_ROWS
from mvmr_loss.loss import invariance_loss, variance_loss


def inputs(dtype=torch.float64, n=9):
    """z, two augmented views and a representation, each related to the others."""
    generator = torch.Generator().manual_seed(0)
    z, noise, other, y = torch.randn(4, n, 6, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (z, z + 0.3 * noise, z.square() + 0.5 * other, z.abs() + y)]


def loss(z, v, w, y):
    return MVMRLoss(representation_views="both", variance_margin=2.0)(z, [v, w], {"y": y})


def regularizer(z, v, w, y):
    return MultiRepresentationRegularizer()([z, v, w], {"y": y})


def by_blocks(z, v, w, y):
    measure = {"name": "u_distance_correlation_sqr", "block_size": 4}
    return MVMRLoss(dependence_measure=measure)(z, [v, w], {"y": y})


def terms(z, v, w, y):
    return invariance_loss(z, v) + invariance_loss(w, y) + variance_loss(z, margin=3.0)


@pytest.mark.parametrize("function", [loss, regularizer, by_blocks, terms])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_some_inputs_is_that_of_all(function, dtype):
    tensors = [t.requires_grad_() for t in inputs(dtype)]
    expected = torch.autograd.grad(function(*tensors), tensors)
    assert all(grad.abs().sum() > 1e-3 for grad in expected)
    for count in (1, 2, 3):
        for wanted in itertools.combinations(range(4), count):
            some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs(dtype))]
            found = torch.autograd.grad(function(*some), [some[i] for i in wanted])
            for i, grad in zip(wanted, found, strict=True):
                torch.testing.assert_close(grad, expected[i], rtol=1e-4, atol=1e-7)


def test_a_representation_may_be_learned():
    z, v, _, y = (t.requires_grad_() for t in inputs())
    assert torch.autograd.gradcheck(lambda y: MVMRLoss()(z, v, {"y": y, "same": z}), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_half_precision_is_float32_of_the_same_numbers(dtype, scale):
    """Values, whatever their size, and gradients, which come back in the type of the input."""
    halves = [(scale * t).to(dtype).requires_grad_() for t in inputs(n=40)]
    singles = [t.detach().float().requires_grad_() for t in halves]
    for function in (loss, regularizer, by_blocks, terms):
        value, expected = function(*halves), function(*singles)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        found = torch.autograd.grad(value, halves)
        for ours, theirs in zip(found, torch.autograd.grad(expected, singles), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs.to(dtype), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_every_term_has_the_type_of_the_embeddings(own, other):
    z, v, w, y = (t.to(own).requires_grad_() for t in inputs())
    y = y.detach().to(other).requires_grad_()
    components = MVMRLoss(dependence_weight=0).forward_components(z, [v, w], {"y": y})
    assert components.total.dtype == own
    assert {term.dtype for term in components.terms.values()} == {own}
    for tensor, grad in zip(
        (z, v, y), torch.autograd.grad(components.total, (z, v, y)), strict=True
    ):
        assert grad.dtype == tensor.dtype


def test_the_widest_type_of_the_views_is_that_of_all():
    z, v, w, y = inputs()
    expected = MVMRLoss()(z.float().double(), [v, w], {"y": y})
    for views in (
        (z.float(), [v, w], {"y": y}),
        (z.float(), [v, w], {"y": y}, [v.float(), w.float()]),
        (z.float(), [v.float(), w.float()], {"y": y}, [v, w]),
    ):
        assert MVMRLoss()(*views).dtype == torch.float64
    assert torch.equal(MVMRLoss()(z.float(), [v, w], {"y": y}), expected)
    regularizer = MultiRepresentationRegularizer()
    assert regularizer([z.float(), v], {"y": y}).dtype == torch.float64


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_view_counts_alike(count):
    """In any order and each as much as the others, in every term: none is left out or counted twice."""
    z, v, w, y = inputs()
    views = [v, w, v.roll(1, dims=0) + w][:count]
    for criterion in (
        MVMRLoss(variance_margin=2.0),
        MVMRLoss(representation_views="both", variance_margin=2.0),
    ):
        components = criterion.forward_components(z, views, {"y": y})
        turned = criterion.forward_components(z, views[::-1], {"y": y})
        torch.testing.assert_close(components.terms, turned.terms)
        alone = [criterion.forward_components(z, view, {"y": y}).terms for view in views]
        for name, term in components.terms.items():
            parts = torch.stack([terms[name] for terms in alone])
            if name == "representations/y" and criterion.representation_views == "both":
                # z has its share once, not once for each view.
                own = 1 - criterion.measure(z, y)
                parts = torch.cat([2 * parts - own, own[None]])
            torch.testing.assert_close(term, parts.mean())
    regularizer = MultiRepresentationRegularizer()
    parts = torch.stack([regularizer(view, {"y": y}) for view in views])
    torch.testing.assert_close(regularizer(views, {"y": y}), parts.mean())


def plain_variance(z, margin=1.0, eps=1e-4):
    return torch.relu(margin - torch.sqrt(z.var(dim=0) + eps)).mean()


# On a CPU from 2^17 numbers on in slices of 1024 columns.
@pytest.mark.parametrize("shape", [(64, 2048), (64, 2047), (50, 2700), (2, 2**16), (1100, 120)])
def test_variance_of_wide_batches(shape):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.8 + 3
    z[:, :5] = 1.0
    z.requires_grad_()
    value, expected = variance_loss(z, 1.1), plain_variance(z, 1.1)
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad(value, z, create_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, z)[0])
    direction = z.detach().sin()
    # The second derivative, and the forward one.
    other = torch.autograd.grad(plain_variance(z, 1.1), z, create_graph=True)[0]
    torch.testing.assert_close(
        torch.autograd.grad((found * direction).sum(), z)[0],
        torch.autograd.grad((other * direction).sum(), z)[0],
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.detach(), direction)
        tangent = torch.autograd.forward_ad.unpack_dual(variance_loss(dual, 1.1)).tangent
    torch.testing.assert_close(tangent, (other.detach() * direction).sum())


class TestNames:
    """What an input is called in errors."""

    def test_of_one_view_and_of_several(self):
        z, v, w, y = inputs()
        wrong = torch.ones(9, 5, dtype=torch.float64)
        for views, called in (
            (wrong, r"^z_augmented must"),
            ([wrong], r"^z_augmented must"),
            ([v, wrong], r"^z_augmented\[1\] must"),
            ((wrong, v), r"^z_augmented\[0\] must"),
        ):
            with pytest.raises(ValueError, match=called):
                MVMRLoss()(z, views)
        for views, called in (
            (wrong[:, 0], r"^embeddings must have shape \(N, D\) but has shape \(9,\)"),
            ([z, wrong[:, 0]], r"^embeddings\[1\] must have shape \(N, D\)"),
        ):
            with pytest.raises(ValueError, match=called):
                MultiRepresentationRegularizer()(views, {"y": y})
        with pytest.raises(ValueError, match=r"^embeddings must not be empty but is \[\]"):
            MultiRepresentationRegularizer()([], {"y": y})

    @pytest.mark.parametrize("views", ["z", None, 3, {"a": 1}])
    def test_what_is_no_view(self, views):
        z, _, _, y = inputs()
        with pytest.raises(TypeError, match=r"^z_augmented must be a torch.Tensor or a list"):
            MVMRLoss()(z, views)
        with pytest.raises(TypeError, match=r"^embeddings must be a torch.Tensor or a list"):
            MultiRepresentationRegularizer()(views, {"y": y})

    @pytest.mark.parametrize("weights", [[1.0], (1.0, 2.0), ()])
    def test_weights_in_a_list(self, weights):
        with pytest.raises(TypeError, match="mapping from the representations' names to numbers"):
            MVMRLoss(representation_weights=weights)
        with pytest.raises(TypeError, match="weights must be a number but is a str"):
            MVMRLoss(representation_weights="1")

    def test_weights_of_other_names(self):
        z, v, _, y = inputs()
        criterion = MVMRLoss(representation_weights={"b": 1.0, "a": 1.0})
        with pytest.raises(ValueError, match=r"same names but are \['c', 'y'\] and \['a', 'b'\]"):
            criterion(z, v, {"y": y, "c": y})
        # Weights of what is not there do no harm where nothing is.
        torch.testing.assert_close(criterion(z, v), MVMRLoss()(z, v))

    def test_another_device(self):
        z, v, _, y = inputs()
        with pytest.raises(ValueError, match="must be on cpu like the embeddings but is on meta"):
            MVMRLoss()(z, v, {"y": y.to("meta")})

    def test_a_measure_of_ones_own_is_named_in_errors(self):
        class Wide(DependenceMeasure):
            min_samples = 20

        z, v, _, _ = inputs()
        with pytest.raises(ValueError, match="at least 20 samples for Wide but has 9"):
            MVMRLoss(dependence_measure=Wide())(z, v)
        with pytest.raises(ValueError, match="4 samples for debiased_cka but has 3"):
            MVMRLoss(dependence_measure="debiased_cka")(z[:3], v[:3])


def test_the_order_of_the_terms_and_their_weights():
    z, v, _, y = inputs()
    criterion = MVMRLoss(
        invariance_weight=0.5, dependence_weight=-2, representation_weights={"b": -3.0, "a": 0.0}
    )
    found = criterion.forward_components(z, v, {"b": y, "a": y})
    names = ["invariance", "variance", "dependence", "representations/b", "representations/a"]
    assert list(found.terms) == list(found.weights) == names
    assert list(found.weights.values()) == [0.5, 1, 2, 3, 0]
    assert list(found.as_dict("p/")) == ["p/loss", *(f"p/{name}" for name in names)]
    assert found.terms["representations/a"] == 0
    value = criterion.measure(z, v)
    torch.testing.assert_close(found.terms["dependence"], value)
    assert found.as_dict()["dependence"] == 2 * value
    assert found.as_dict(weighted=False)["dependence"] == value


def test_printing_tells_every_option():
    text = repr(MVMRLoss(eps=0.25, variance_margin=3, representation_weights={"a": -1}))
    assert "invariance_weight=1.0, variance_weight=1.0, dependence_weight=1.0, repr" in text
    for said in (
        *("invariance_weight=1.0", "variance_weight=1.0", "dependence_weight=1.0", "eps=0.25"),
        *("representation_weights={'a': -1.0}", "representation_views='augmented'"),
        *("variance_margin=3.0", "gather_distributed=False", "identity_weight=0.0"),
        "covariance_weight=0.0",
    ):
        assert said in text
    assert "weights=2.0, gather_distributed=True" in repr(
        MultiRepresentationRegularizer(2, gather_distributed=True)
    )


def test_defaults_are_the_papers():
    criterion = MVMRLoss()
    assert criterion.variance_margin == 1
    assert criterion.eps == 1e-4
    assert criterion.measure.name == "distance_correlation"
    assert MultiRepresentationRegularizer().weights == 1
    assert MultiRepresentationRegularizer().measure.name == "distance_correlation"
    # In one process it would change nothing.
    assert criterion.gather_distributed is False
    assert MultiRepresentationRegularizer().gather_distributed is False
    z = torch.zeros(4, 2)
    assert variance_loss(z) == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"invariance_weight": -0.1}, "invariance_weight must be finite and at least 0"),
        ({"variance_weight": -0.1}, "variance_weight must be finite and at least 0"),
        ({"identity_weight": -0.1}, "identity_weight must be finite and at least 0"),
        ({"covariance_weight": -0.1}, "covariance_weight must be finite and at least 0"),
        ({"variance_margin": -0.1}, "variance_margin must be finite and at least 0"),
        ({"eps": 0.0}, "eps must be finite and above 0"),
        ({"eps": -0.1}, "eps must be finite and above 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MVMRLoss(**options)
    MVMRLoss(**dict.fromkeys(options, 1e-9 if "eps" in options else 0.0))


@pytest.mark.parametrize("name", ["dependence_weight", "representation_weights"])
def test_signed_options_are_finite(name):
    with pytest.raises(ValueError, match=f"^{name} must be finite but is inf"):
        MVMRLoss(**{name: float("inf")})


def test_representation_views_are_named():
    with pytest.raises(
        ValueError, match="^representation_views must be one of 'augmented', 'both'"
    ):
        MVMRLoss(representation_views="all")


@pytest.mark.parametrize("gathers", [False, True])
def test_is_gathered_when_asked_for_in_one_order(gathers, monkeypatch):
    calls = []

    def gather(tensors):
        calls.append(list(tensors))
        return tensors, ALL_ROWS

    monkeypatch.setattr(_objective, "gather", gather)
    z, v, _, y = inputs()
    MVMRLoss(gather_distributed=gathers)(z, v, {"b": y, "a": y})
    ordered = ["z", "z_augmented", "representations['a']", "representations['b']"]
    assert calls == ([ordered] if gathers else [])


def test_the_second_head_gives_numbers():
    z, v, _, y = inputs()
    with pytest.raises(TypeError, match="^representation_embeddings must have a floating-point"):
        MVMRLoss()(z, v, {"y": y}, y.long())


def test_gather_distributed_is_a_bool():
    for kind in (MVMRLoss, MultiRepresentationRegularizer):
        with pytest.raises(TypeError, match="^gather_distributed must be True or False"):
            kind(gather_distributed="yes")


@pytest.mark.parametrize("function", [MVMRLoss(), MultiRepresentationRegularizer()])
def test_representations_are_named_by_strings(function):
    z, v, _, y = inputs()
    views = (z, v) if isinstance(function, MVMRLoss) else (z,)
    with pytest.raises(TypeError, match="representations must be named by strings but has the nam"):
        function(*views, {0: y, 1: y})
    option = "representation_weights" if isinstance(function, MVMRLoss) else "weights"
    with pytest.raises(TypeError, match=f"{option} must be named by strings but has the name 0"):
        type(function)(**{option: {0: 1.0}})


@pytest.mark.parametrize("block_size", [None, 4])
def test_features_of_inference_mode(block_size):
    measure = {"name": "distance_correlation", "block_size": block_size}
    z, v, _, y = inputs()
    with torch.inference_mode():
        made = y * 1
    assert made.is_inference()
    found = MVMRLoss(dependence_measure=measure)(z.requires_grad_(), v, {"y": made})
    torch.testing.assert_close(found, MVMRLoss(dependence_measure=measure)(z, v, {"y": y}))
    assert torch.autograd.grad(found, z)[0].isfinite().all()


def test_views_of_inference_mode():
    criterion = MVMRLoss(identity_weight=1.0, covariance_weight=1.0)
    z, v, _, y = inputs()
    with torch.inference_mode():
        made = v * 1
    found = criterion(z.requires_grad_(), made, {"y": y}, [made, z])
    expected = criterion(z, v, {"y": y}, [v, z])
    assert torch.equal(found, expected)
    slopes = [torch.autograd.grad(value, z)[0] for value in (found, expected)]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("second", [False, True])
def test_views_are_on_one_device(second):
    z, v, _, y = inputs()
    views = (z, v, {"y": y}, v.to("meta")) if second else (z, v.to("meta"), {"y": y})
    name = "representation_embeddings" if second else "z_augmented"
    with pytest.raises(ValueError, match=f"{name} must be on cpu like .* but is on meta"):
        MVMRLoss()(*views)


def test_a_representation_of_one_number():
    z, v, _, y = inputs()
    whole, one = ({"y": y[:, :1]}, {"y": y[:, 0]})
    assert torch.equal(MVMRLoss()(z, v, one), MVMRLoss()(z, v, whole))
    regularizer = MultiRepresentationRegularizer()
    assert torch.equal(regularizer(z, one), regularizer(z, whole))

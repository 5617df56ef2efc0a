"""The objective against a plain float64 reference, its options, its gradients and its errors."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss
from mvmr_loss.dependence import (
    dependence_measure,
    distance_correlation,
    matrices,
    u_distance_correlation_sqr,
)
from mvmr_loss.loss import invariance_loss, variance_loss

MEASURES = [
    "distance_correlation",
    "distance_correlation_sqr",
    "u_distance_correlation_sqr",
    "hsic",
    "cka",
    "debiased_cka",
]


def reference_distance_correlation(x, y):
    """From the definition, with a loop over all pairs, in float64."""

    def centered(x):
        x = x.double().flatten(1)
        d = torch.stack([torch.stack([(a - b).square().sum().sqrt() for b in x]) for a in x])
        return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()

    a, b = centered(x), centered(y)
    return ((a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt()).sqrt()


def reference_loss(z, z_augmented, representations, weights=1.0, margin=1.0):
    """The objective of method and paper, written out for one augmented view."""
    z, z_augmented = z.double(), z_augmented.double()
    loss = ((z - z_augmented) ** 2).mean()
    for view in (z, z_augmented):
        std = (view.var(dim=0, unbiased=True) + 1e-4).sqrt()
        loss = loss + (margin - std).clamp(min=0).mean()
    loss = loss + 1 - reference_distance_correlation(z, z_augmented)
    for name, y in representations.items():
        w = weights[name] if isinstance(weights, dict) else weights
        d = reference_distance_correlation(z_augmented, y)
        loss = loss + (w * (1 - d) if w >= 0 else -w * d)
    return loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(10, 12, generator=generator)
    return (
        z,
        z + 0.3 * torch.randn(10, 12, generator=generator),
        {
            "pixels": torch.rand(10, 3, 6, 6, generator=generator),
            "hog": torch.rand(10, 40, generator=generator),
        },
    )


class TestValue:
    def test_equals_the_formula(self, batch):
        expected = reference_loss(*batch)
        torch.testing.assert_close(MVMRLoss()(*batch).double(), expected, rtol=1e-5, atol=1e-6)

    def test_equals_the_formula_in_float64(self, batch):
        z, v, ys = batch
        ys = {k: y.double() for k, y in ys.items()}
        expected = reference_loss(z, v, ys)
        torch.testing.assert_close(
            MVMRLoss()(z.double(), v.double(), ys), expected, rtol=1e-9, atol=1e-12
        )

    def test_weights_scale_their_terms(self, batch):
        weights = {"pixels": 0.5, "hog": 3.0}
        weighted = MVMRLoss(
            invariance_weight=2.0,
            variance_weight=3.0,
            dependence_weight=4.0,
            representation_weights=weights,
        ).forward_components(*batch)
        plain = MVMRLoss().forward_components(*batch)
        for name, weight in {
            "invariance": 2.0,
            "variance": 3.0,
            "dependence": 4.0,
            "representations/pixels": 0.5,
            "representations/hog": 3.0,
        }.items():
            torch.testing.assert_close(weighted.terms[name], plain.terms[name])
            torch.testing.assert_close(weighted.as_dict()[name], weight * plain.terms[name])
            assert weighted.weights[name] == weight
            torch.testing.assert_close(
                weighted.as_dict("a/", weighted=False)[f"a/{name}"], plain.terms[name]
            )

    def test_a_negative_weight_is_the_releases_sign(self, batch):
        z, v, ys = batch
        terms = MVMRLoss(representation_weights=-2.0).forward_components(z, v, ys).as_dict()
        torch.testing.assert_close(
            terms["representations/hog"], 2 * distance_correlation(v, ys["hog"])
        )
        torch.testing.assert_close(
            MVMRLoss(representation_weights=-1.0)(*batch).double(),
            reference_loss(*batch, weights=-1.0),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_weight_zero_leaves_a_term_out(self, batch):
        z, v, _ = batch
        z = z.requires_grad_()
        loss = MVMRLoss(dependence_weight=0.0, representation_weights=0.0)
        components = loss.forward_components(*batch)
        for name in ("dependence", "representations/pixels", "representations/hog"):
            assert components.terms[name] == 0
        torch.testing.assert_close(
            components.total, components.terms["invariance"] + components.terms["variance"]
        )

    def test_components_sum_to_the_scalar(self, batch):
        components = MVMRLoss().forward_components(*batch)
        assert list(components.terms)[3:] == ["representations/pixels", "representations/hog"]
        named = components.as_dict()
        torch.testing.assert_close(named.pop("loss"), MVMRLoss()(*batch))
        torch.testing.assert_close(sum(named.values()), MVMRLoss()(*batch))
        torch.testing.assert_close(components.total, MVMRLoss()(*batch))

    @pytest.mark.parametrize("representations", [None, {}])
    def test_without_representations(self, batch, representations):
        z, v, _ = batch
        expected = reference_loss(z, v, {})
        actual = MVMRLoss()(z, v, representations)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)

    def test_several_views_are_averaged(self, batch):
        z, v, ys = batch
        # Not one that keeps the distances, as a flip or a rotation would.
        other = v.roll(1, dims=0) + 0.3 * v.square()
        alone = [MVMRLoss().forward_components(z, view, ys).terms for view in (v, other)]
        both = MVMRLoss().forward_components(z, [v, other], ys).terms
        for name, term in both.items():
            torch.testing.assert_close(term, (alone[0][name] + alone[1][name]) / 2)
            assert (alone[0][name] - alone[1][name]).abs() > 1e-3
        torch.testing.assert_close(MVMRLoss()(z, [v], ys), MVMRLoss()(z, v, ys))

    def test_perfect_agreement(self):
        z = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 3
        components = MVMRLoss().forward_components(z, z, {"itself": 5 * z + 1})
        assert components.terms["invariance"] == 0
        assert components.terms["variance"] == 0
        assert components.terms["dependence"].abs() < 1e-6
        assert components.terms["representations/itself"].abs() < 1e-5

    def test_margin(self, batch):
        z, v, _ = batch
        assert MVMRLoss(variance_margin=0.0).forward_components(z, v).terms["variance"] == 0
        torch.testing.assert_close(
            MVMRLoss(variance_margin=2.5)(z, v).double(),
            reference_loss(z, v, {}, margin=2.5),
            rtol=1e-5,
            atol=1e-6,
        )

    @pytest.mark.parametrize("measure", MEASURES)
    def test_any_measure_by_name(self, batch, measure):
        criterion = MVMRLoss(dependence_measure=measure)
        components = criterion.forward_components(*batch)
        z, v, ys = batch
        expected = 1 - criterion.measure(v, ys["hog"])
        torch.testing.assert_close(components.terms["representations/hog"], expected)

    def test_a_measure_as_object(self, batch):
        z, v, ys = batch
        actual = MVMRLoss(
            dependence_measure=dependence_measure("u_distance_correlation_sqr")
        ).forward_components(*batch)
        torch.testing.assert_close(
            actual.terms["representations/hog"], 1 - u_distance_correlation_sqr(v, ys["hog"])
        )


class TestCost:
    def test_each_matrix_is_made_once(self, batch, monkeypatch):
        made = []
        plain = matrices._float32_distances

        def counted(x):
            made.append(x.shape[1])
            return plain(x)

        monkeypatch.setattr(matrices, "_float32_distances", counted)
        z, v, ys = batch
        MVMRLoss(representation_views="both")(z, [v, 2 * v], ys)
        assert sorted(made) == sorted([*[z.shape[1]] * 3, *(y[0].numel() for y in ys.values())])


class TestGradient:
    def test_gradcheck(self, batch):
        z, v, ys = batch
        ys = {k: y.double() for k, y in ys.items()}
        z, v = z.double().requires_grad_(), v.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: MVMRLoss()(a, b, ys), (z, v))

    def test_gradgradcheck(self, batch):
        z, v, ys = batch
        z, v = z[:6, :3].double(), v[:6, :3].double()
        y = ys["hog"][:6].double()
        assert torch.autograd.gradgradcheck(
            lambda a, b: MVMRLoss()(a, b, {"hog": y}),
            (z.requires_grad_(), v.requires_grad_()),
        )

    def test_both_branches_get_a_gradient(self, batch):
        z, v, ys = batch
        z, v = z.requires_grad_(), v.requires_grad_()
        MVMRLoss()(z, v, ys).backward()
        assert z.grad.abs().sum() > 0
        assert v.grad.abs().sum() > 0

    def test_several_forward_passes_before_one_backward(self, batch):
        z, v, ys = batch
        criterion = MVMRLoss()
        once = torch.autograd.grad(criterion(z.requires_grad_(), v, ys), z)[0]
        twice = torch.autograd.grad(criterion(z, v, ys) + criterion(z, v, ys), z)[0]
        torch.testing.assert_close(twice, 2 * once)

    @pytest.mark.parametrize("measure", MEASURES)
    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
    def test_collapsed_and_extreme_embeddings_stay_finite(self, batch, measure, scale):
        z, v, ys = batch
        z, v = (z * scale).requires_grad_(), (v * scale).requires_grad_()
        criterion = MVMRLoss(dependence_measure=measure)
        # Mean squares of 1e30 are beyond float32: only the dependence can be told there.
        alone = MultiRepresentationRegularizer(dependence_measure=measure)
        loss = alone(v, ys) if scale > 1 else criterion(z, v, ys)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(v.grad).all()

    def test_training_raises_dependence(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(32, 20, generator=generator)
        z = torch.randn(32, 8, generator=generator, requires_grad=True)
        regularizer = MultiRepresentationRegularizer(
            dependence_measure="u_distance_correlation_sqr"
        )
        optimizer = torch.optim.Adam([z], lr=0.05)
        before = u_distance_correlation_sqr(z, y).item()
        for _ in range(100):
            optimizer.zero_grad()
            regularizer(z, {"y": y}).backward()
            optimizer.step()
        assert u_distance_correlation_sqr(z, y).item() > before + 0.4


class TestPrecisionAndCompile:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_embeddings(self, batch, dtype):
        z, v, ys = batch
        exact = MVMRLoss()(z.to(dtype).float(), v.to(dtype).float(), ys)
        loss = MVMRLoss()(z.to(dtype), v.to(dtype), ys)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"covariance_weight": 0.04},
            {"identity_weight": 1.0},
            {"dependence_measure": {"name": "distance_correlation", "block_size": 3}},
            {"dependence_measure": {"name": "hsic", "bandwidth": 2.0}},
        ],
    )
    @pytest.mark.parametrize("width", [None, 512])
    def test_autocast_changes_nothing(self, batch, dtype, options, width):
        z, v, ys = batch
        if width is not None:  # 300 are the squares that leave float16
            z, v = (300 * x.repeat(1, width // x.shape[1]) for x in (z, v))
        z = z.requires_grad_()
        criterion = MVMRLoss(**options)
        with torch.autocast("cpu", dtype=dtype):
            loss = criterion(z, v, ys)
            (found,) = torch.autograd.grad(loss, z, retain_graph=True)
        expected = criterion(z, v, ys)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        assert found.dtype == torch.float32
        (slope,) = torch.autograd.grad(expected, z)
        torch.testing.assert_close(torch.autograd.grad(loss, z)[0], slope, rtol=0, atol=0)

    def test_mixed_precisions(self, batch):
        z, v, ys = batch
        mixed = {"pixels": ys["pixels"].half(), "hog": ys["hog"].double()}
        loss = MVMRLoss()(z, v, mixed)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, MVMRLoss()(z, v, ys), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        "measure",
        [pytest.param(m, marks=() if m in MEASURES[::3] else pytest.mark.slow) for m in MEASURES],
    )
    def test_compile(self, batch, measure):
        z, v, ys = batch
        criterion = MVMRLoss(dependence_measure=measure)
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(criterion(z.requires_grad_(), v, ys), z)[0]
        torch.testing.assert_close(compiled(z, v, ys), criterion(z, v, ys))
        torch.testing.assert_close(torch.autograd.grad(compiled(z, v, ys), z)[0], expected)

    def test_compile_with_inductor(self, batch):
        z, v, ys = batch
        compiled = torch.compile(MVMRLoss(), fullgraph=True)
        torch.testing.assert_close(compiled(z, v, ys), MVMRLoss()(z, v, ys))

    @pytest.mark.skipif(
        torch.__version__ < (2, 14) and not torch.cuda.is_available(),
        reason="torch 2.6 aborts in a Function on fake CUDA tensors without a GPU; 2.14 works",
    )
    @pytest.mark.parametrize("measure", MEASURES)
    def test_no_synchronisation(self, batch, measure):
        """On fake CUDA tensors, which hold no values, looking at a value raises."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        criterion = MVMRLoss(dependence_measure=measure)
        with FakeTensorMode():
            z, v, y = (torch.empty(10, 12, device="cuda", requires_grad=True) for _ in range(3))
            assert criterion(z, [v, z], {"y": y}).device.type == "cuda"
            with pytest.raises(Exception, match="_local_scalar_dense"):
                criterion(z, v).item()

    def test_copies_and_pickles(self, batch):
        criterion = MVMRLoss(representation_weights={"pixels": 1.0, "hog": -1.0})
        for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            torch.testing.assert_close(other(*batch), criterion(*batch))

    def test_has_no_parameters_and_no_state(self):
        assert not list(MVMRLoss().parameters())
        assert not MVMRLoss().state_dict()


class TestRegularizer:
    def test_equals_the_losss_terms(self, batch):
        _, v, ys = batch
        regularizer = MultiRepresentationRegularizer({"pixels": 2.0, "hog": -1.0})
        terms = MVMRLoss(representation_weights={"pixels": 2.0, "hog": -1.0}).forward_components(
            *batch
        )
        expected = [term for name, term in terms.as_dict().items() if "/" in name]
        torch.testing.assert_close(regularizer(v, ys), torch.stack(expected).sum())

    def test_both_views_may_meet_the_representations(self, batch):
        z, v, ys = batch
        options = {"invariance_weight": 0, "variance_weight": 0, "dependence_weight": 0}
        loss = MVMRLoss(representation_views="both", **options)(z, v, ys)
        torch.testing.assert_close(loss, MultiRepresentationRegularizer()([z, v], ys))
        augmented = MVMRLoss(**options)(z, v, ys)
        torch.testing.assert_close(augmented, MultiRepresentationRegularizer()(v, ys))
        assert (loss - augmented).abs() > 1e-3
        with pytest.raises(ValueError, match="must be one of 'augmented', 'both' but is 'all'"):
            MVMRLoss(representation_views="all")

    def test_adds_to_another_loss(self, batch):
        z, v, ys = batch
        labels = torch.arange(10) % 3
        z = z.requires_grad_()
        alone = F.cross_entropy(z, labels)
        (alone + 0.5 * MultiRepresentationRegularizer()(z, ys)).backward()
        assert torch.isfinite(z.grad).all()

    def test_views_are_averaged(self, batch):
        z, v, ys = batch
        regularizer = MultiRepresentationRegularizer()
        torch.testing.assert_close(
            regularizer([z, v], ys), (regularizer(z, ys) + regularizer(v, ys)) / 2
        )


class TestException:
    def test_shapes(self, batch):
        z, v, ys = batch
        criterion = MVMRLoss()
        with pytest.raises(
            ValueError, match=r"z must have shape \(N, D\) but has shape \(10, 3, 4\)"
        ):
            criterion(z.view(10, 3, 4), v)
        with pytest.raises(ValueError, match=r"z_augmented must have the same shape .*\(10, 12\)"):
            criterion(z, v[:, :5])
        with pytest.raises(ValueError, match=r"z_augmented\[1\] must have the same shape"):
            criterion(z, [v, v[:5]])
        with pytest.raises(
            ValueError, match=r"representations\['hog'\] must have shape \(10, ...\)"
        ):
            criterion(z, v, {"hog": ys["hog"][:4]})
        with pytest.raises(ValueError, match=r"representations\['hog'\] must have shape"):
            criterion(z, v, {"hog": torch.tensor(1.0)})

    def test_types(self, batch):
        z, v, ys = batch
        criterion = MVMRLoss()
        with pytest.raises(TypeError, match=r"z must be a torch.Tensor but is a ndarray"):
            criterion(z.numpy(), v)
        with pytest.raises(
            TypeError,
            match=r"z_augmented must be a torch.Tensor or a list of them but is a NoneType",
        ):
            criterion(z, None)
        with pytest.raises(TypeError, match=r"z must have a floating-point dtype .*int64"):
            criterion(z.long(), v)
        with pytest.raises(TypeError, match="representations must be a mapping .* Tensor"):
            criterion(z, v, ys["hog"])
        with pytest.raises(TypeError, match=r"representations\['a'\] .* floating-point"):
            criterion(z, v, {"a": torch.ones(10, 3, dtype=torch.uint8)})

    def test_empty(self, batch):
        z, v, _ = batch
        with pytest.raises(ValueError, match="representations must not be empty"):
            MultiRepresentationRegularizer()(z, {})
        with pytest.raises(ValueError, match="z_augmented must not be empty"):
            MVMRLoss()(z, [])

    @pytest.mark.parametrize(
        ("measure", "needed"), [("distance_correlation", 2), ("u_distance_correlation_sqr", 4)]
    )
    def test_small_batch(self, batch, measure, needed):
        z, v, _ = batch
        criterion = MVMRLoss(dependence_measure=measure)
        with pytest.raises(ValueError, match=f"z must have at least {needed} samples"):
            criterion(z[: needed - 1], v[: needed - 1])
        assert torch.isfinite(criterion(z[:needed], v[:needed]))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite(self, batch, bad):
        z, v, ys = batch
        broken = z.clone()
        broken[3, 4] = bad
        with pytest.raises(ValueError, match="z must be finite"):
            MVMRLoss()(broken, v)
        with pytest.raises(ValueError, match="z_augmented must be finite"):
            MVMRLoss()(z, broken)
        with pytest.raises(ValueError, match=r"representations\['x'\] must be finite"):
            MVMRLoss()(z, v, {"x": broken})

    def test_weights(self, batch):
        with pytest.raises(ValueError, match="same names .*'pixels'"):
            MVMRLoss(representation_weights={"pixels": 1.0})(*batch)
        with pytest.raises(ValueError, match="invariance_weight must be finite and at least 0"):
            MVMRLoss(invariance_weight=-1)
        with pytest.raises(ValueError, match="dependence_weight must be finite but is nan"):
            MVMRLoss(dependence_weight=float("nan"))
        with pytest.raises(TypeError, match=r"representation_weights\['a'\] must be a number"):
            MVMRLoss(representation_weights={"a": "1"})
        with pytest.raises(TypeError, match="weights must be a number"):
            MultiRepresentationRegularizer([1.0])

    def test_unknown_measure(self):
        with pytest.raises(ValueError, match="distance_correlation.*nonsense"):
            MVMRLoss(dependence_measure="nonsense")
        with pytest.raises(TypeError, match="dependence_measure"):
            MVMRLoss(dependence_measure=3)


class TestTerms:
    def test_invariance(self, batch):
        z, v, _ = batch
        torch.testing.assert_close(invariance_loss(z, v), ((z - v) ** 2).sum() / 120)

    @pytest.mark.parametrize("width", [5, 1024, 2500])
    def test_variance_equals_its_definition(self, width):
        generator = torch.Generator().manual_seed(0)
        z = 3 + torch.randn(7, width, generator=generator, dtype=torch.float64) * 0.8
        z = z.requires_grad_()
        expected = torch.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()
        torch.testing.assert_close(variance_loss(z), expected)
        torch.testing.assert_close(
            torch.autograd.grad(variance_loss(z), z), torch.autograd.grad(expected, z)
        )

    def test_variance_of_a_collapsed_batch_has_a_finite_gradient(self):
        z = torch.ones(5, 3, requires_grad=True)
        loss = variance_loss(z)
        loss.backward()
        torch.testing.assert_close(loss.detach(), torch.tensor(0.99))
        assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("kind", ["second head", "two names", "one view", "itself"])
def test_one_tensor_under_two_names_has_one_matrix(kind):
    z, v = torch.randn(2, 16, 8).unbind()
    z, v, y = z.requires_grad_(), v.requires_grad_(), torch.randn(16, 5)
    given = {
        "second head": (z, v, {"y": y}, v),
        "two names": (z, v, {"a": y, "b": y}),
        "one view": (z, z),
        "itself": (z, v, {"itself": z}),
    }[kind]
    torch.compiler.reset()
    compiled = torch.compile(MVMRLoss(), fullgraph=True)
    assert compiled(*given).item() == pytest.approx(MVMRLoss()(*given).item(), rel=1e-5)

"""Regression and dependence in one loss, of one teacher and of several."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss, Representations
from mvmr_loss.cache import RepresentationCache
from mvmr_loss.dependence import TokenDistanceCorrelation, distance_correlation
from mvmr_loss.dependence.cross import cross_distance_correlation
from mvmr_loss.distillation import DistillationLoss, Standardization

DIMS = {"clip": 6, "dino": 5}
ANCHORED = {"dependence_weight": 0.5, "anchors": 4}
EACH_VIEW = {"stacked": False}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    z, v = torch.randn(2, 9, 4)
    return [z.requires_grad_(), v], {"clip": torch.randn(9, 6), "dino": torch.randn(9, 5)}


def test_terms_are_those_of_their_parts(batch):
    views, teachers = batch
    criterion = DistillationLoss(
        4,
        DIMS,
        regression_weight={"clip": 2.0, "dino": 0.0},
        dependence_weight={"clip": 0.5, "dino": -1},
        **EACH_VIEW,
    ).fit(teachers)
    found = criterion.forward_components(views, teachers)
    clip, dino = (
        torch.stack([distance_correlation(z, teachers[name]) for z in views]).mean()
        for name in DIMS
    )
    expected = {
        "regression/clip": criterion.regressions["clip"](views, teachers["clip"]),
        "dependence/clip": 1 - clip,
        "dependence/dino": dino,
    }
    assert list(found.terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found.terms[name], value)
    total = 2 * expected["regression/clip"] + 0.5 * (1 - clip) + dino
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.as_dict("train/")["train/loss"], total)


def test_without_regression_there_is_nothing_to_train(batch):
    options = {"regression_weight": 0.0, "dependence_weight": 0.5, **EACH_VIEW}
    criterion = DistillationLoss(4, DIMS, **options)
    assert list(criterion.parameters()) == []
    expected = MultiRepresentationRegularizer(0.5)(*batch)
    torch.testing.assert_close(criterion(*batch), expected)


def test_without_dependence_a_batch_of_one_will_do(batch):
    views, teachers = batch
    criterion = DistillationLoss(4, DIMS, dependence_weight=0.0).fit(teachers)
    one = criterion([z[:1] for z in views], {name: y[:1] for name, y in teachers.items()})
    assert one.isfinite()


def test_anchors_join_the_batch(batch):
    views, teachers = batch
    options = {"regression_weight": 0.0, "dependence_weight": 1.0, **EACH_VIEW}
    criterion = DistillationLoss(4, DIMS, anchors=5, **options)
    torch.testing.assert_close(criterion(*batch), MultiRepresentationRegularizer()(*batch))
    earlier = torch.randn(8, 4), {name: torch.randn(8, width) for name, width in DIMS.items()}
    criterion.update([earlier[0], earlier[0] + 1], earlier[1])
    kept, kept_teachers = criterion.bank.samples()
    expected = 0.0
    for name, y in teachers.items():
        of = [
            cross_distance_correlation(
                z, y, torch.cat([z, kept]), torch.cat([y, kept_teachers[name]])
            )
            for z in views
        ]
        expected = expected + 1 - torch.stack(of).mean()
    found = criterion(*batch)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert views[0].grad.abs().sum() > 0
    assert len(kept) == 5


@pytest.mark.parametrize("anchors", [0, 5])
@pytest.mark.parametrize("stacked", [False, True])
def test_directions_are_embeddings_and_features_of_length_1(batch, stacked, anchors):
    options = {"regression_weight": 0.0, "dependence_weight": 1.0, "anchors": anchors}
    criterion = DistillationLoss(4, DIMS, directions=True, stacked=stacked, **options)
    plain = DistillationLoss(4, DIMS, stacked=stacked, **options)
    views, teachers = batch

    def scaled(batch, length):
        x, y = batch
        return [length * F.normalize(z, dim=1) for z in x], {
            name: F.normalize(values, dim=1) for name, values in y.items()
        }

    for _ in range(2):  # the second time with anchors
        torch.testing.assert_close(criterion(*batch), plain(*scaled(batch, 1)))
        torch.testing.assert_close(criterion(*batch), criterion(*scaled(batch, 1e-12)))
        criterion.update(views, teachers)
        plain.update(*scaled(batch, 1))


def test_stacked_views_are_one_batch_with_the_same_features(batch):
    views, teachers = batch
    options = {"regression_weight": 0.0, "dependence_weight": 1.0}
    criterion = DistillationLoss(4, DIMS, stacked=True, **options)
    twice = {name: torch.cat([y, y]) for name, y in teachers.items()}
    expected = MultiRepresentationRegularizer()(torch.cat(views), twice)
    torch.testing.assert_close(criterion(*batch), expected)
    # One view, or two that agree, but for the distance of 0 between them.
    assert criterion([views[0]], teachers) == MultiRepresentationRegularizer()(views[0], teachers)
    apart = criterion([views[0], views[0] + 10], teachers)
    assert criterion([views[0], views[0]], teachers) < apart


@pytest.mark.parametrize("stacked", [False, True])
def test_views_and_teachers_have_one_number_of_samples(batch, stacked):
    views, teachers = batch
    criterion = DistillationLoss(4, DIMS, dependence_weight=1.0, stacked=stacked)
    with pytest.raises(ValueError, match=r"embeddings\[1\] must have shape \(9, 4\)"):
        criterion([views[0], views[1][:-1]], teachers)
    with pytest.raises(ValueError, match=r"teachers\['clip'\] must have shape \(9, \.\.\.\)"):
        criterion(views, {name: y[:-1] for name, y in teachers.items()})


def test_statistics_come_from_a_store(tmp_path, batch):
    _, teachers = batch
    store = RepresentationCache.create(tmp_path / "store", DIMS, 9, dtype=torch.float32)
    store.write(range(9), teachers)
    criterion = DistillationLoss(4, DIMS).fit(store)
    mean = criterion.regressions["dino"].standardization.mean
    torch.testing.assert_close(mean, teachers["dino"].mean(0))
    cached = Representations(None, cache=tmp_path / "store")
    again = DistillationLoss(4, DIMS).fit(cached).regressions["dino"].standardization.mean
    assert torch.equal(again, mean)
    with pytest.raises(ValueError, match="open store"):
        criterion.fit(Representations(["pixels"]))
    with pytest.raises(ValueError, match="source must have clip, dino but has clip"):
        criterion.fit({"clip": teachers["clip"]})


def test_a_checkpoint_has_head_statistics_and_anchors(batch):
    views, teachers = batch
    criterion = DistillationLoss(4, DIMS, dependence_weight=0.5, anchors=4).fit(teachers)
    criterion.update(*batch)
    restored = DistillationLoss(4, DIMS, dependence_weight=0.5, anchors=4)
    restored.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(restored(*batch), criterion(*batch))


def test_compiles_whole(batch):
    criterion = DistillationLoss(4, DIMS, dependence_weight=0.5, anchors=4).fit(batch[1])
    criterion.update(*batch)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch), criterion(*batch))


@pytest.mark.parametrize("anchors", [16, 300])  # full after two batches, and never here
@pytest.mark.parametrize("within", [False, True])
def test_anchors_do_not_compile_anew_at_every_step(batch, anchors, within):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    criterion = DistillationLoss(4, DIMS, anchors=anchors).fit(batch[1])

    def step(views, teachers):
        loss = criterion(views, teachers)
        if within:
            criterion.update(views, teachers)
        return loss

    compiled = torch.compile(step, backend=counted, fullgraph=True)
    found = []
    for _ in range(20):  # more than torch compiles anew
        value = compiled(*batch)
        if not within:
            criterion.update(*batch)
        found.append(counted.frame_count)
    assert 0 < found[1] == found[-1], found
    eager = copy.deepcopy(criterion)
    torch.testing.assert_close(compiled(*batch), eager(*batch))
    assert value.isfinite()
    assert len(eager.bank.samples()[0]) == anchors


def test_a_weight_of_0_is_a_term_of_0_with_anchors_as_without(batch):
    weights = {"clip": 0.0, "dino": 1.0}
    for anchors in (0, 4):
        criterion = DistillationLoss(4, DIMS, dependence_weight=weights, anchors=anchors)
        for _ in range(2):
            terms = criterion.forward_components(*batch).terms
            criterion.update(*batch)
            assert terms["dependence/clip"] == 0 < terms["dependence/dino"]


@pytest.mark.parametrize("scale", ["isotropic", "coordinate"])
def test_no_gradient_enters_a_teacher(batch, scale):
    views, teachers = batch
    leaves = {name: y.clone().requires_grad_() for name, y in teachers.items()}
    DistillationLoss(4, DIMS, scale=scale)(views, leaves).backward()
    assert all(y.grad is None for y in leaves.values())
    assert views[0].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("images", "measure"), [(1, "distance_correlation"), (3, "u_distance_correlation_sqr")]
)
@pytest.mark.parametrize("stacked", [True, False])
def test_views_of_too_few_images_are_no_batch(batch, images, measure, stacked):
    views, teachers = batch
    criterion = DistillationLoss(4, DIMS, dependence_measure=measure, stacked=stacked)
    few = [z[:images] for z in views], {name: y[:images] for name, y in teachers.items()}
    with pytest.raises(ValueError, match=f"must (be of|have) at least {images + 1} "):
        criterion(*few)
    enough = [z[: images + 1] for z in views], {k: y[: images + 1] for k, y in teachers.items()}
    assert criterion(*enough).isfinite()


@pytest.mark.parametrize("build", [MVMRLoss, MultiRepresentationRegularizer])
def test_a_measure_of_tokens_is_refused_where_images_are_compared(build):
    measure = TokenDistanceCorrelation()
    with pytest.raises(ValueError, match="dependence_measure must compare images"):
        build(dependence_measure=measure)
    with pytest.raises(ValueError, match="dependence_measure must compare images"):
        DistillationLoss(4, DIMS, dependence_measure=measure)


def test_half_precision_keeps_the_statistics(batch):
    views, teachers = batch
    teachers = {name: 400 * y for name, y in teachers.items()}
    criterion = DistillationLoss(4, DIMS)
    whole = criterion(views, teachers)
    half = copy.deepcopy(criterion).half()
    found = half([z.half() for z in views], {name: y.half() for name, y in teachers.items()})
    torch.testing.assert_close(found, whole, rtol=2e-3, atol=0, check_dtype=False)


def test_teachers_are_split_from_other_representations(batch):
    _, teachers = batch
    criterion = DistillationLoss(4, DIMS)
    hog = torch.randn(9, 3)
    found, others = criterion.split(
        {"dino": teachers["dino"], "hog": hog, "clip": teachers["clip"]}
    )
    assert list(found) == ["clip", "dino"]
    assert list(others) == ["hog"]
    with pytest.raises(ValueError, match="features must have 'dino', .* but have 'clip', 'hog'"):
        criterion.split({"clip": teachers["clip"], "hog": hog})
    with pytest.raises(ValueError, match="teachers must be clip, dino but are .*hog; split"):
        criterion([hog[:, :1].expand(-1, 4)], {**teachers, "hog": hog})


def test_fits_to_a_full_cache_only(tmp_path):
    images = torch.rand(6, 3, 8, 8)
    criterion = DistillationLoss(4, {"pixels": 192})
    fitted = criterion.regressions["pixels"].standardization.fitted
    assert not criterion.fit_if_full(Representations(["pixels"]))
    cache = {"path": tmp_path / "store", "dataset": images}
    representations = Representations(["pixels"], normalization="none", cache=cache)
    with pytest.warns(UserWarning, match="store is not there yet: .* fill it first"):
        assert not criterion.fit_if_full(
            representations
        )  # as at the first training with a new folder
    representations(images[:5], torch.arange(5))
    with pytest.warns(UserWarning, match="lacks 1 of 6 samples: .* fill it first"):
        assert not criterion.fit_if_full(representations)
    assert not fitted
    representations(images[5:], torch.tensor([5]))
    assert criterion.fit_if_full(representations)
    assert fitted


def test_a_teacher_that_no_store_keeps_is_left_to_what_was_seen(tmp_path):
    images = torch.rand(6, 3, 8, 8)
    cache = {"path": tmp_path / "store", "dataset": images}
    names = ["pixels", "augmented_pixels"]
    representations = Representations(names, normalization="none", cache=cache)
    representations(images, torch.arange(6))
    criterion = DistillationLoss(4, dict.fromkeys(names, 192))
    assert criterion.fit_if_full(representations)
    fitted = {name: bool(r.standardization.fitted) for name, r in criterion.regressions.items()}
    assert fitted == {"pixels": True, "augmented_pixels": False}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"teacher_dims": {}}, ValueError, "at least one teacher"),
        ({"teacher_dims": [6]}, TypeError, "teacher_dims must be a mapping"),
        ({"teacher_dims": {"vit.dino": 6}}, ValueError, r"teacher_dims must have .* 'vit\.dino'"),
        ({"teacher_dims": {"keys": 6}}, ValueError, "teacher_dims must have .* 'keys'"),
        ({"teacher_dims": {0: 6}}, ValueError, "teacher_dims must have .* but has 0"),
        ({"teacher_dims": {"clip": 0}}, ValueError, "teacher_dims.*must be at least 1"),
        ({"regression_weight": -1.0}, ValueError, "regression_weight must be at least 0"),
        ({"dependence_weight": {"clip": 1.0}}, ValueError, "dependence_weight must have the names"),
        ({**ANCHORED, "dependence_measure": "cka"}, ValueError, "distance_correlation"),
        (
            {**ANCHORED, "dependence_measure": {"name": "distance_correlation", "exponent": 0.5}},
            ValueError,
            "without options",
        ),
        (
            {"regression_weight": 0.0, "dependence_weight": 0.0},
            ValueError,
            "must not all be 0",
        ),
        (
            {"anchors": 4, "dependence_weight": 0.0},
            ValueError,
            "anchors must be 0 where dependence_weight is 0",
        ),
        ({"directions": 1}, TypeError, "directions must be True or False"),
        ({"stacked": None}, TypeError, "stacked must be True or False"),
        ({"gather_distributed": 1}, TypeError, "gather_distributed must be True or False"),
    ],
)
def test_argument_errors(options, error, match):
    with pytest.raises(error, match=match):
        DistillationLoss(**{"embedding_dim": 4, "teacher_dims": DIMS, **options})


def test_input_errors(batch):
    views, teachers = batch
    criterion = DistillationLoss(4, DIMS).fit(teachers)
    with pytest.raises(ValueError, match="teachers must be clip, dino but are clip"):
        criterion(views, {"clip": teachers["clip"]})
    with pytest.raises(ValueError, match=r"teachers\['dino'\] must have shape \(N, 5\)"):
        criterion(views, {**teachers, "dino": torch.randn(9, 7)})
    with pytest.raises(TypeError, match="teachers must be a mapping"):
        criterion(views, teachers["clip"])
    with pytest.raises(ValueError, match="must be finite"):
        criterion(views, {**teachers, "dino": torch.full((9, 5), torch.inf)})


@pytest.mark.parametrize("regression_weight", [1.0, 0.0])
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("anchors", [0, 6])
def test_dependence_is_on_features_standardised_coordinate_by_coordinate(
    regression_weight, fitted, anchors
):
    torch.manual_seed(0)
    y = torch.randn(12, 5) * torch.tensor([100.0, 1, 1, 1, 0.1]) + 3
    z = y[:, 1:4] + 0.1 * torch.randn(12, 3)
    criterion = DistillationLoss(
        3,
        {"y": 5},
        regression_weight=regression_weight,
        dependence_weight=1.0,
        scale="coordinate",
        anchors=anchors,
        **EACH_VIEW,
    )
    if fitted:
        criterion.fit({"y": y})
    for _ in range(2):  # of a batch seen twice the statistics are the same
        terms = criterion.forward_components(z, {"y": y}).terms
        if anchors:
            criterion.update(z, {"y": y})
    standardized = (y - y.mean(0)) / y.std(0, correction=0)
    if not anchors:
        expected = 1 - distance_correlation(z, standardized)
        torch.testing.assert_close(terms["dependence/y"], expected, rtol=1e-4, atol=1e-5)
    raw = 1 - distance_correlation(z, y)
    assert terms["dependence/y"] < raw - 0.1
    if not fitted:  # each batch is counted, once
        (own,) = (m for m in criterion.modules() if isinstance(m, Standardization))
        assert own.count == 24


@pytest.mark.parametrize("anchors", [0, 4])
@pytest.mark.parametrize("stacked", [True, False])
def test_weights_may_change_during_training(batch, anchors, stacked):
    options = {"anchors": anchors, "stacked": stacked}
    torch.manual_seed(0)
    changed = DistillationLoss(4, DIMS, dependence_weight=0.1, **options).fit(batch[1])
    for weight in (0.3, -0.3, {"clip": 0.0, "dino": 2.0}):
        torch.manual_seed(0)
        built = DistillationLoss(4, DIMS, dependence_weight=weight, **options).fit(batch[1])
        changed.dependence_weight = weight
        found, expected = (c.forward_components(*batch) for c in (changed, built))
        assert torch.equal(found.total, expected.total)
        assert found.weights == expected.weights
        assert torch.stack(list(found.terms.values())).equal(
            torch.stack(list(expected.terms.values()))
        )
    changed.regression_weight = {"clip": 0.0, "dino": 0.5}
    assert changed.forward_components(*batch).weights["regression/dino"] == 0.5


def test_weights_that_cannot_be_taken_on():
    criterion = DistillationLoss(4, DIMS, regression_weight=0.0)
    with pytest.raises(ValueError, match="regression_weight must be 0 for 'clip', which has no he"):
        criterion.regression_weight = 1.0
    with pytest.raises(ValueError, match="dependence_weight must not be 0 where no teacher has a "):
        criterion.dependence_weight = 0.0
    with pytest.raises(ValueError, match="dependence_weight must have the names"):
        criterion.dependence_weight = {"clip": 1.0}
    assert criterion.dependence_weight == dict.fromkeys(DIMS, 0.3)


def test_a_batch_that_is_not_finite_is_named_and_spoils_nothing(batch):
    views, teachers = batch
    criterion = DistillationLoss(4, DIMS)
    expected = criterion(views, teachers)
    spoilt = {**teachers, "dino": teachers["dino"].clone()}
    spoilt["dino"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"teachers\['dino'\] must be finite"):
        criterion(views, spoilt)
    torch.testing.assert_close(criterion(views, teachers), expected)


@pytest.mark.parametrize("source", [None, torch.ones(3, 6), ["clip"]])
def test_sources_of_statistics_are_checked(source):
    with pytest.raises(TypeError, match="source must be representations with a cache"):
        DistillationLoss(4, DIMS).fit(source)


@pytest.mark.parametrize("anchors", [0, 3])
def test_teachers_of_one_number(anchors):
    torch.manual_seed(0)
    z, y = torch.randn(9, 4), torch.randn(9)
    options = {"regression_weight": 0.0, "anchors": anchors}
    found = []
    for features in (y, y[:, None]):
        criterion = DistillationLoss(4, {"score": 1}, **options)
        criterion.update(z[:3], {"score": features[:3]})
        found.append(criterion(z, {"score": features}))
    assert torch.equal(*found)


def test_averages_of_weights_take_its_buffers():
    criterion = DistillationLoss(4, {"a": 8}).fit({"a": torch.randn(16, 8)})
    averaged = AveragedModel(criterion, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(criterion)
    assert averaged.module.regressions["a"].standardization.fitted == 1


def test_a_bool_of_older_checkpoints_is_taken():
    criterion = DistillationLoss(4, {"a": 8}).fit({"a": torch.randn(16, 8)})
    state = criterion.state_dict()
    state = {k: v.bool() if k.endswith("fitted") else v for k, v in state.items()}
    other = DistillationLoss(4, {"a": 8})
    other.load_state_dict(state)
    assert other.regressions["a"].standardization.fitted == 1


def test_not_all_weights_are_set_to_0():
    criterion = DistillationLoss(4, {"a": 8})
    criterion.dependence_weight = 0
    with pytest.raises(ValueError, match="must not all be 0"):
        criterion.regression_weight = 0
    assert criterion.regression_weight == {"a": 1.0}


@pytest.mark.parametrize("name", ["regression_weight", "dependence_weight"])
def test_weights_are_set_as_a_whole(name):
    with pytest.raises(TypeError, match="does not support item assignment"):
        getattr(DistillationLoss(4, {"a": 8}), name)["a"] = 5.0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rotation": "bogus"}, "rotation must be one of"),
        ({"hidden_dim": -3}, "hidden_dim must be at least 0"),
        ({"cosine_weight": "x"}, "cosine_weight must be a number"),
    ],
)
def test_options_of_heads_are_looked_at_without_a_head(option, message):
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=message):
        DistillationLoss(8, {"a": 32}, regression_weight=0, **option)
    DistillationLoss(8, {"a": 32}, regression_weight=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_names_the_teacher_that_is_wrong():
    criterion = DistillationLoss(4, {"a": 8, "b": 6})
    with pytest.raises(ValueError, match=r"source\['b'\]: features must have shape \(N, 6\)"):
        criterion.fit({"a": torch.randn(16, 8), "b": torch.randn(16, 5)})

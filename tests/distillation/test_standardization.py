"""Isotropic standardisation, its statistics and rotations."""

import warnings

import pytest
import torch

from mvmr_loss.cache import RepresentationCache
from mvmr_loss.distillation import Standardization, hadamard, stored_features
from tests.processes import run


@pytest.fixture
def features():
    torch.manual_seed(0)
    return 5 + torch.randn(200, 12) @ torch.diag(torch.logspace(-2, 1, 12)) @ torch.randn(12, 12)


def test_one_scale_for_all_coordinates(features):
    module = Standardization(12, rotation="none").fit(features)
    expected = (features - features.mean(0)) / features.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(module(features), expected, rtol=1e-4, atol=1e-5)


def test_hadamard_gives_every_coordinate_the_same_variance_and_keeps_distances(features):
    plain = Standardization(12, rotation="none").fit(features)(features)
    module = Standardization(12, rotation="hadamard").fit(features)
    rotated = module(features)
    torch.testing.assert_close(rotated.var(0, correction=0), torch.ones(12), rtol=1e-3, atol=0)
    distances = [torch.pdist(x.double()) for x in (rotated, plain)]
    torch.testing.assert_close(*distances, rtol=1e-4, atol=0)
    assert plain.var(0, correction=0).max() > 1.5  # what the rotation mends


def test_auto_rotates_where_the_width_allows(features):
    rotated = Standardization(12, rotation="hadamard").fit(features)(features)
    torch.testing.assert_close(Standardization(12).fit(features)(features), rotated)
    plain = Standardization(11, rotation="none").fit(features[:, 1:])
    auto = Standardization(11).fit(features[:, 1:])
    assert torch.equal(auto(features[:, 1:]), plain(features[:, 1:]))


def test_parts_and_the_whole_are_the_same(features):
    whole = Standardization(12, rotation="hadamard").fit(features)
    parts = Standardization(12, rotation="hadamard").fit(iter(features.split(33)))
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.variance, whole.variance)


def test_a_large_mean_costs_no_digits(features):
    exact = Standardization(12, rotation="none").fit(features.double())
    moved = Standardization(12, rotation="none").fit(features.double() + 1e6)
    torch.testing.assert_close(moved.variance, exact.variance, rtol=1e-5, atol=0)


def test_without_fit_batches_are_counted_in_training_only(features):
    module = Standardization(12, rotation="none")
    for part in features.split([50, 90, 60]):
        module(part)
    torch.testing.assert_close(module.mean, features.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        module.variance, features.var(0, correction=0).mean(), rtol=1e-4, atol=0
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()(features * 3)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    restored = Standardization(12, rotation="none")
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored.eval()(features), module(features))


def test_what_was_fitted_stays(features):
    module = Standardization(12, rotation="none").fit(features)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(features[:9] * 100)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_nothing_is_replaced_in_forward(features):
    module = Standardization(12, rotation="none")
    held = {name: value.data_ptr() for name, value in module.named_buffers()}
    module(features)
    assert held == {name: value.data_ptr() for name, value in module.named_buffers()}


def test_equal_features_of_a_first_batch_are_zero():
    assert (Standardization(3)(torch.ones(4, 3)) == 0).all()


def test_fit_errors(features):
    module = Standardization(12, rotation="none")
    with pytest.raises(ValueError, match="at least 2 samples but are of 1"):
        module.fit(features[:1])
    with pytest.raises(ValueError, match="at least 2 samples but are of 0"):
        module.fit([])
    with pytest.raises(ValueError, match="all equal"):
        module.fit(features[:1].expand(5, 12))
    with pytest.raises(ValueError, match=r"shape \(N, 12\)"):
        module.fit(features[:, :5])
    with pytest.raises(ValueError, match="features must be finite"):
        module.fit(features.log())
    with pytest.raises(TypeError, match="floating-point"):
        module.fit(features.long())


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 64, 96, 384, 768, 1152])
def test_hadamard(order):
    matrix = hadamard(order)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.mT, order * torch.eye(order))


@pytest.mark.parametrize("order", [3, 6, 92, 100])
def test_hadamard_of_other_orders(order):
    with pytest.raises(ValueError, match=f"but is {order}; use rotation='none'"):
        hadamard(order)
    with pytest.raises(ValueError, match="rotation='none'"):
        Standardization(order, rotation="hadamard")


def test_a_store_gives_its_features(tmp_path, features):
    store = RepresentationCache.create(
        tmp_path / "store", {"a": 3, "teacher": 12}, 200, dtype=torch.float32
    )
    rows = {"a": features[:, :3], "teacher": features}
    store.write(range(150), {name: values[:150] for name, values in rows.items()})
    with pytest.raises(ValueError, match="must have all 200 samples but lacks 50; fill it first"):
        list(stored_features(store, "teacher"))
    store.write(range(150, 200), {name: values[150:] for name, values in rows.items()})
    parts = list(stored_features(store, "teacher", batch_size=64))
    assert [len(part) for part in parts] == [64, 64, 64, 8]
    assert torch.equal(torch.cat(parts), features)
    with pytest.raises(ValueError, match="name must be one of a, teacher but is 'b'"):
        list(stored_features(store, "b"))


def test_a_scale_for_each_coordinate(features):
    features[:, 4] = 7.0  # constant
    module = Standardization(12, scale="coordinate").fit(iter(features.split(33)))
    out = module(features)
    torch.testing.assert_close(out.mean(0), torch.zeros(12), rtol=0, atol=1e-4)
    expected = torch.ones(12)
    expected[4] = 0
    torch.testing.assert_close(out.var(0, correction=0), expected, rtol=1e-4, atol=0)
    assert module.rotation_matrix is None


def test_a_scale_for_each_coordinate_from_batches(features):
    module = Standardization(12, scale="coordinate")
    for part in features.split([50, 90, 60]):
        module(part)
    torch.testing.assert_close(module.variance, features.var(0, correction=0), rtol=1e-4, atol=1e-6)
    fitted = Standardization(12, scale="coordinate").fit(features)
    torch.testing.assert_close(module.eval()(features), fitted(features), rtol=1e-3, atol=1e-3)


def test_exception_scale():
    with pytest.raises(ValueError, match="scale must be one of 'isotropic', 'coordinate' but is"):
        Standardization(12, scale="each")
    with pytest.raises(ValueError, match="rotation must be 'auto' or 'none' with scale='coordi"):
        Standardization(12, scale="coordinate", rotation="hadamard")


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_autocast_changes_nothing(features, rotation):
    module = Standardization(12, rotation=rotation).fit(features).eval()
    expected = module(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(features), expected)


def test_float64_takes_float32_features(features):
    module = Standardization(12).fit(features).eval()
    expected = module(features)
    torch.testing.assert_close(module.double()(features).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("scale", ["isotropic", "coordinate"])
def test_a_batch_that_is_not_finite_is_not_counted(features, value, scale):
    module, without = (Standardization(12, scale=scale) for _ in range(2))
    spoilt = features[50:90].clone()
    spoilt[3, 2] = value
    for part in (spoilt, features[:50], spoilt, features[90:]):
        module(part)
    for part in (features[:50], features[90:]):
        without(part)
    for name, buffer in module.state_dict().items():
        assert torch.equal(buffer, without.state_dict()[name]), name
    assert module.count == 160


def count_batches(rank, _, features):
    """Batches of different sizes, the last process's with nothing to share but its share."""
    module = Standardization(12, gather_distributed=True)
    for first in (0, 100):
        own = features[first : first + 37] if rank == 0 else features[first + 37 : first + 100]
        module(own)
    assert module.count == 200
    torch.testing.assert_close(module.mean, features.mean(0), rtol=1e-4, atol=1e-4)
    variance = features.var(0, correction=0).mean()
    torch.testing.assert_close(module.variance, variance, rtol=1e-4, atol=0)


def test_processes_may_have_different_numbers_of_samples(tmp_path, features):
    run(2, tmp_path, count_batches, features)


def test_coordinates_of_very_different_size_are_kept(features):
    scales = torch.logspace(-3, 2.5, 12)
    found = Standardization(12, scale="coordinate").fit((features - 5) * scales)(
        (features - 5) * scales
    )
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(12), rtol=1e-3, atol=0)


def test_wide_features_are_rotated_only_if_asked_for():
    assert Standardization(4096).rotation_matrix is not None
    assert Standardization(8192).rotation_matrix is None
    wide = Standardization(49 * 768)  # whose covariance would have eleven gigabytes
    assert wide.rotation_matrix is None
    features = torch.randn(3, 49 * 768)
    torch.testing.assert_close(wide.fit(features)(features).square().mean(), torch.tensor(1.0))


def test_a_rotation_without_statistics_is_told_once(features):
    module = Standardization(12, rotation="hadamard")
    with pytest.warns(UserWarning, match="rotation='hadamard' needs the statistics"):
        module(features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(features)
        Standardization(12)(features)
        Standardization(12, rotation="hadamard").fit(features)(features)


def test_fitting_in_the_midst_of_a_training_is_told(features):
    module = Standardization(12)
    module(features)
    with pytest.warns(UserWarning, match="200 features were standardised .* before the training"):
        module.fit(features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.fit(features)


@pytest.mark.parametrize("features", [None, 3.0])
def test_what_is_no_feature_is_named(features):
    with pytest.raises(TypeError, match="features must be a tensor, or an iterable of parts"):
        Standardization(12).fit(features)

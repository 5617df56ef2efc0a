from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common.data import image_tensor
from benchmarks.common.photographs import Photographs
from mvmr_loss import Representations
from mvmr_loss._random import random_bits, random_signs
from mvmr_loss.dependence import distance_correlation
from mvmr_loss.representations import sketch as sketch_module
from mvmr_loss.representations.pixels import Pixels
from mvmr_loss.representations.sketch import FoldedSignSketch, Sketched, folded_sign_sketch

NAMES = ["pixels", "scattering", "hog", "local_std", "dct"]


@pytest.fixture(scope="module")
def photographs():
    images, _ = image_tensor(Photographs("train", crops_per_class=3), 64)
    return (images.float() / 255 - 0.45) / 0.23


@pytest.fixture(scope="module")
def features(photographs):
    return Representations(NAMES)(photographs)


def plain_sketch(x: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """The definition: signs, zero padding, slices, rotation of each, sum."""
    slices = -(-x.shape[1] // dim)
    signed = torch.nn.functional.pad(
        x * random_signs(seed, 0, x.shape[1]), (0, slices * dim - x.shape[1])
    ).view(len(x), slices, dim)
    rotations = (random_bits(seed, 2**62, slices) % dim).tolist()
    return sum(signed[:, b].roll(rotation, dims=1) for b, rotation in enumerate(rotations))


def distances(x: torch.Tensor) -> torch.Tensor:
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (x[i].double() - x[j].double()).norm(dim=1)


@pytest.mark.parametrize(("width", "dim"), [(12, 4), (13, 4), (100, 7), (9, 8), (5, 1)])
@pytest.mark.parametrize("seed", [0, 3, 2**40])
def test_is_the_definition(width, dim, seed):
    x = torch.randn(6, width, dtype=torch.float64)
    torch.testing.assert_close(folded_sign_sketch(x, dim, seed), plain_sketch(x, dim, seed))


@pytest.mark.parametrize("width", [1, 7, 8])
def test_narrow_input_is_kept(width):
    x = torch.randn(3, width)
    assert torch.equal(folded_sign_sketch(x, 8), x)
    assert folded_sign_sketch(x.half(), 8).dtype == torch.float32


def test_numbers_are_fixed():
    sketch = folded_sign_sketch(torch.arange(1.0, 21.0)[None], 6, seed=1)
    assert sketch.tolist() == [[-28.0, -20.0, 10.0, -23.0, 8.0, 7.0]]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_cardinality_and_dtype(dtype):
    sketch = FoldedSignSketch(32)(torch.rand(5, 3, 8, 8).to(dtype))
    assert sketch.shape == (5, 32)
    assert sketch.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_linear_and_commutes_with_slicing():
    sketch, (a, b) = FoldedSignSketch(16, seed=2), torch.randn(2, 9, 75, dtype=torch.float64)
    torch.testing.assert_close(sketch(2 * a - 3 * b), 2 * sketch(a) - 3 * sketch(b))
    assert torch.equal(sketch(a)[2:5], sketch(a[2:5]))
    strided = a.T.contiguous().T
    assert torch.equal(sketch(strided), sketch(a))


def test_other_widths_in_turn():
    sketch = FoldedSignSketch(16)
    for width in (40, 90, 20, 91):
        x = torch.randn(3, width)
        assert torch.equal(sketch(x), folded_sign_sketch(x, 16))


def test_seeds_differ_and_nothing_is_saved():
    x = torch.randn(2, 64)
    assert not torch.equal(folded_sign_sketch(x, 8, 0), folded_sign_sketch(x, 8, 1))
    sketch = FoldedSignSketch(8)
    sketch(x)
    assert sketch.state_dict() == {}
    assert list(sketch.parameters()) == []


def test_squared_distances_are_unbiased_with_the_stated_variance():
    # Energy in few coordinates, which a fold without rotation would put on top of one another.
    x = torch.zeros(1, 8 * 64, dtype=torch.float64)
    x[0, ::64] = torch.linspace(1, 2, 8)
    x[0, 5] = 1.5
    energy = x.square().view(8, 64).sum(1)
    share = energy / energy.sum()
    squared = (
        torch.stack([folded_sign_sketch(x, 64, seed).square().sum() for seed in range(1500)])
        / x.square().sum()
    )
    expected = (2 / 64 * (1 - share.square().sum())).sqrt()
    assert abs(squared.mean() - 1) < 4 * expected / 1500**0.5
    assert squared.std() == pytest.approx(expected.item(), rel=0.2)


@pytest.mark.parametrize("dim", [256, 1024, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_distance_error_on_photographs(features, name, dim):
    exact = distances(features[name])
    errors = []
    for seed in range(6):
        error = distances(folded_sign_sketch(features[name], dim, seed)) / exact - 1
        errors.append(error.square().mean().sqrt().item())
    bound = (2 * dim) ** -0.5
    assert sum(errors) / len(errors) < 1.2 * bound
    assert max(errors) < 1.5 * bound


@pytest.mark.parametrize("name", NAMES)
def test_effect_on_distance_correlation(features, name):
    generator = torch.Generator().manual_seed(0)
    y = features[name]
    z = features["pixels"][:, :3000:100] + torch.randn(len(y), 30, generator=generator)
    exact = distance_correlation(z, y)
    for dim, tolerance in ((256, 0.03), (1024, 0.015), (4096, 0.006)):
        assert abs(distance_correlation(z, folded_sign_sketch(y, dim)) - exact) < tolerance


def test_representations_are_sketched(photographs):
    names = ["pixels", "hog"]
    exact = Representations(names)(photographs[:4])
    representations = Representations(names, sketch_dim=512, sketch_seed=5)
    for name, y in representations(photographs[:4]).items():
        torch.testing.assert_close(y, folded_sign_sketch(exact[name], 512, 5))
    assert representations.sizes(3, 64, 64) == {"pixels": 512, "hog": 512}
    # 8 x 8 pixels have 192 numbers: no sketch.
    small = torch.randn(2, 3, 8, 8)
    assert torch.equal(representations(small)["pixels"], small.flatten(1))


def test_sketched_keeps_what_it_wraps():
    random = Representations(["augmented_pixels", "pixels"], sketch_dim=64).by_name
    assert not random["augmented_pixels"].cacheable
    assert random["pixels"].cacheable
    sketched = Sketched(Pixels(differentiable=True), 8)
    images = torch.randn(2, 1, 4, 4, requires_grad=True)
    sketched(images).sum().backward()
    torch.testing.assert_close(images.grad.abs(), torch.ones_like(images))


def test_gradcheck():
    x = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FoldedSignSketch(4), x)


def test_compile():
    sketch = FoldedSignSketch(16)
    compiled = torch.compile(sketch, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 100)
    expected = folded_sign_sketch(x, 16)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)


def test_compiled_sketches_of_several_widths_in_one_graph():
    """Two constants of one function are told apart; a gradient keeps the op away."""
    x = torch.randn(4, 100, requires_grad=True)

    def sketches(x):
        return folded_sign_sketch(x, 16), folded_sign_sketch(x[:, :70], 16, 1)

    for made, expected in zip(
        torch.compile(sketches, fullgraph=True, backend="aot_eager")(x), sketches(x), strict=True
    ):
        torch.testing.assert_close(made, expected)


def test_numpy_options():
    x = torch.randn(4, 100)
    sketch = FoldedSignSketch(np.int64(16), np.uint8(3))
    assert repr(sketch) == "FoldedSignSketch(dim=16, seed=3)"
    assert torch.equal(sketch(x), folded_sign_sketch(x, 16, 3))


def test_second_derivative_and_transforms():
    x = torch.randn(2, 11, dtype=torch.float64)
    sketch = FoldedSignSketch(4)
    assert torch.autograd.gradgradcheck(sketch, x.clone().requires_grad_())
    jacobian = torch.autograd.functional.jacobian(sketch, x)
    torch.testing.assert_close(torch.func.jacrev(sketch)(x), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(sketch)(x), jacobian)


def test_cpu_and_accelerator_agree():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x, sketch = torch.randn(8, 10_000), FoldedSignSketch(256)
    assert torch.equal(sketch(x), sketch(x.cuda()).cpu())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0,), ValueError, "dim must be at least 1 but is 0"),
        ((2.5,), TypeError, "dim must be an int but is a float"),
        ((8, -1), ValueError, "seed must be at least 0"),
        ((8, "a"), TypeError, "seed must be an int but is a str"),
    ],
)
def test_exception_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        FoldedSignSketch(*arguments)


def test_exception_input():
    sketch = FoldedSignSketch(8)
    with pytest.raises(TypeError, match="^x must have a floating-point"):
        sketch(torch.ones(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(N, D\) or \(N, ...\) but has shape \(16,\)"):
        sketch(torch.ones(16))
    with pytest.raises(TypeError, match="representation must be"):
        Sketched(torch.nn.Flatten(), 8)


def test_the_shape_is_known_without_values():
    with FakeTensorMode():
        assert folded_sign_sketch(torch.empty(3, 20), 8).shape == (3, 8)


def test_the_seed_is_0_by_default():
    assert Sketched(Pixels(), 8).seed == FoldedSignSketch(8).seed == 0


def test_a_sketched_representation_asks_for_images_as_large():
    wrapped = Representations(["scattering"]).by_name["scattering"]
    sketched = Sketched(wrapped, 8)
    assert sketched.minimum_size == wrapped.minimum_size > 1
    small = wrapped.minimum_size - 1
    with pytest.raises(ValueError, match=f"at least {small + 1}"):
        sketched(torch.randn(1, 3, small, small))


@pytest.mark.parametrize(("width", "dim"), [(7, 3), (12, 4), (100, 7), (5000, 64), (1025, 1024)])
def test_folded_at_once_is_folded_slice_by_slice(width, dim, monkeypatch):
    """What an accelerator computes in few launches."""
    cpu = torch.device("cpu")
    x = torch.randn(6, width, dtype=torch.float64)
    rotations = sketch_module._rotations(3, dim, -(-width // dim))
    signs = sketch_module._signs(cpu, 3, width, x.dtype)
    expected = sketch_module._fold(x, signs, rotations, dim)
    places, turned = sketch_module._turned(cpu, 3, dim, width, x.dtype)
    for values in (2**27, 2 * width):  # all rows, and few at a time
        monkeypatch.setattr(sketch_module, "_SLICE_ACCELERATOR", values)
        found = sketch_module._fold_at_once(x, places, turned, -(-width // dim), dim)
        torch.testing.assert_close(found, expected)
        low = sketch_module._fold_at_once(x.half(), places, turned, -(-width // dim), dim)
        assert low.dtype == torch.float64


def test_folded_at_once_compiles_for_any_batch_and_works_in_fake_tensors():
    """As an accelerator's path is compiled, here on a CPU, and for a GPU that need not be there."""

    def fold(x):
        places, turned = sketch_module._turned(x.device, 0, 64, 1000, torch.float32)
        return sketch_module._fold_at_once(x, places, turned, 16, 64)

    compiled = torch.compile(fold, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 9):
        x = torch.randn(n, 1000, requires_grad=True)
        torch.testing.assert_close(compiled(x), folded_sign_sketch(x, 64))
        (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad(folded_sign_sketch(x, 64).square().sum(), x)
        torch.testing.assert_close(gradient, expected)
    with FakeTensorMode():
        sketch = FoldedSignSketch(64)(torch.empty(8, 1000, device="cuda"))
        assert (sketch.shape, sketch.device.type) == ((8, 64), "cuda")

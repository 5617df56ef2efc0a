"""Representations, sketches, normalisation and heads on drawn images of any size, type and strides."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss import MVMRProjectionHead, Normalization, Representations, TeacherPreprocessing
from mvmr_loss._random import random_bits, random_signs
from mvmr_loss.representations import (
    FoldedSignSketch,
    Scattering2D,
    folded_sign_sketch,
    list_representations,
    local_binary_patterns,
    patch_scattering,
    scattering,
)
from mvmr_loss.representations.registry import representation_class
from tests.property.cases import DTYPES, batches, cases
from tests.property.images import OPTIONS, Images, image_batches, representations
from tests.property.references import REPRESENTATIONS

# Every representation, of as few numbers as it can be of.
SMALL = {
    "pixels": {},
    "dct": {},
    "local_std": {},
    "hog": {"orientations": 4},
    "scattering": {"L": 2},
    "patch_scattering": {"J": 1, "L": 2, "grid_size": 2},
    "augmented_pixels": {"seed": 5, "normalization": "none"},
}


SQUARED = ("local_std", "scattering", "patch_scattering")
LARGE = Images("noise", (2, 3, 16, 16), 20, 0, torch.float32, "plain")


@cases(
    80,
    1200,
    representation=representations(),
    images=image_batches(),
    gradient=st.booleans(),
    examples=[
        # HOG's gradients of tiny images, which were NaN, and its norms of large ones, which were 0.
        {
            "representation": ("hog", {"block_norm": norm}),
            "images": dataclasses.replace(LARGE, size=size),
            "gradient": True,
        }
        for norm in (None, "L2", "L2-Hys")
        for size in (-20, -19, 20)
    ],
)
def test_finite_or_refused(representation, images, gradient):
    name, options = representation
    module = representation_class(name)(**options, differentiable=gradient)
    x = images.tensor().requires_grad_(gradient)
    if min(images.shape[2:]) < module.minimum_size:
        with pytest.raises(ValueError, match="must be at least"):
            module(x)
        return
    # Colours change, and only they must be in [0, 1] by the normalisation stated.
    if name == "augmented_pixels" and images.shape[1] == 3 and x.max() > 2:
        with pytest.raises(ValueError, match="images must"):
            module(x)
        return
    features = module(x)
    assert features.shape == (images.shape[0], *module.output_shape(*images.shape[1:]))
    assert features.dtype == torch.promote_types(x.dtype, torch.float32)
    # As they say themselves: squares of larger numbers leave the range.
    if name in SQUARED and features.dtype == torch.float32 and x.abs().max() > 1e18:
        return
    assert torch.isfinite(features).all()
    if gradient:
        (slope,) = torch.autograd.grad(features.sum(), x)
        assert slope.dtype == x.dtype
        assert torch.isfinite(slope).all()
    else:
        assert not features.requires_grad


@cases(40, 800, representation=representations(), images=image_batches(8, 40, st.integers(-3, 0)))
def test_layout_batch_and_precision_do_not_matter(representation, images):
    name, options = representation
    module = representation_class(name)(**options)
    if min(images.shape[2:]) < module.minimum_size:
        return
    x = images.numbers()
    features = module(images.tensor())
    size = max(features.double().abs().max().item(), 1e-30)
    # Magnitudes of HOG's directions may fall into the neighbouring bin by a rounding.
    rounded = name == "hog" and options["interpolation"] == "none"

    def close(a, b, tolerance):
        differ = (a.double() - b.double()).abs() > tolerance * size
        assert differ.double().mean() <= (0.2 if rounded else 0)

    close(features, representation_class(name)(**options)(x), 1e-5)
    if name == "augmented_pixels":  # every image of every call has a draw of its own
        return
    close(features, torch.cat([module(x[i]) for i in range(len(x))]), 1e-5)
    if name == "hog":  # a direction of rounding noise, normalised, has no precision
        return
    # Where nothing varies, as in a constant image, a feature is the rounding of the images.
    size = max(size, 1e-3 * x.double().abs().max().item())
    close(features, module(x.double()), 1e-3)


@cases(
    80,
    1200,
    representation=representations(without=("scattering", "patch_scattering", "augmented_pixels")),
    images=image_batches(8, 24, st.integers(-3, 3)),
    examples=[
        {"representation": ("hog", {"block_norm": norm}), "images": LARGE}
        for norm in ("L1", "L2", "L2-Hys")
    ],
    reached=0.6,
)
def test_value_and_gradient_are_the_references(representation, images):
    name, options = representation
    module = representation_class(name)(**options, differentiable=True)
    if min(images.shape[2:]) < module.minimum_size:
        return False
    leaf = images.tensor().requires_grad_()
    x = images.numbers().double().requires_grad_()
    features, expected = module(leaf), REPRESENTATIONS[name](x, **options)
    assert features.shape == expected.shape
    normalized = name == "hog" and options.get("block_norm") is not None
    # A coefficient of the whole image is larger than its largest pixel.
    size = max(y.detach().abs().max().item() for y in (x, expected))
    if normalized:
        # Shares, of which the rounding of the pixels is the more the less there is in their block,
        # which holds what its fullest cell holds and more.
        cells = {**options, "block_norm": None, "cells_per_block": 1}
        held = REPRESENTATIONS[name](x.detach(), **cells).sum(2)
        held = torch.nn.functional.max_pool2d(held, options.get("cells_per_block", 1), 1)
        held = torch.where(held > 0, held, torch.inf)
        size = 1 + 0.1 * x.detach().abs().max() / held
        size = size.view(*size.shape[:2], *[1] * (expected.ndim - 4), *size.shape[2:])
    precision = 1e-10 if images.dtype == torch.float64 else 1e-5
    differ = (features.double() - expected).abs() > precision * (1e-30 + size)
    # An angle at the edge of two bins may fall into the other one by a rounding.
    rounded = name == "hog" and options.get("interpolation") == "none"
    assert differ.double().mean() <= (0.2 if rounded else 0)
    if images.kind != "noise" or rounded or images.dtype in (torch.float16, torch.bfloat16):
        return True  # elsewhere angles and deviations are at their edges, where slopes jump
    generator = torch.Generator().manual_seed(images.seed)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad((features * weights.to(features.dtype)).sum(), leaf)
    (slope,) = torch.autograd.grad((expected * weights).sum(), x)
    error, natural = (found.double() - slope).norm(), weights.norm()
    if normalized:
        # The slope of a share is a difference of two terms, either as large as this.
        natural /= held.min()
    tight, least = (1e-8, 1e-12) if images.dtype == torch.float64 else (1e-3, 1e-6)
    assert error <= tight * slope.norm() + least * natural
    return True


@cases(
    30,
    300,
    images=image_batches(8, 40, st.integers(-3, 3)),
    J=st.integers(1, 2),
    L=st.integers(1, 8),
    grid_size=st.integers(1, 4),
)
def test_patches_are_scattered_by_themselves(images, J, L, grid_size):
    x = images.numbers()
    if min(images.shape[2:]) < grid_size * 2**J:
        return
    height, width = (side // grid_size for side in images.shape[2:])
    found = patch_scattering(images.tensor(), J, L, 2, grid_size)
    for i in range(grid_size):
        for j in range(grid_size):
            rows, columns = (slice(k * n, k * n + n) for k, n in ((i, height), (j, width)))
            expected = scattering(x[..., rows, columns], J, L)
            torch.testing.assert_close(
                found[:, :, i, j], expected, rtol=0, atol=1e-5 * float(x.abs().max())
            )


@cases(
    40,
    300,
    images=image_batches(8, 40, st.integers(-3, 3)),
    leading=st.sampled_from([0, 1, 2, 3]),
    J=st.integers(1, 3),
    L=st.integers(1, 6),
    max_order=st.integers(1, 2),
)
def test_scattering2d_is_scattering(images, leading, J, L, max_order):
    """Whatever leading dimensions there are, padded here or already, and as a list of its paths."""
    x = images.tensor()
    x = [x[0, 0], x[0], x, x[None]][leading]
    shape = images.shape[2:]
    found = Scattering2D(J, shape, L, max_order)(x)
    expected = scattering(x.reshape(-1, 1, *shape), J, L, max_order)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected.reshape(*x.shape[:-2], *expected.shape[2:]))
    paths = Scattering2D(J, shape, L, max_order, out_type="list")(x)
    assert torch.equal(torch.stack([path["coef"] for path in paths], dim=-3), found)
    for path in paths:
        assert [n // L for n in path["n"]] == list(path["j"])
        assert [n % L for n in path["n"]] == list(path["theta"])
        assert list(path["j"]) == sorted(set(path["j"]))
    sides = [2**J * (side // 2**J + 2) for side in shape]
    before = [(padded - side) // 2 for padded, side in zip(sides, shape, strict=True)]
    y = images.numbers()
    y = [y[0, 0], y[0], y, y[None]][leading]
    for dim, (start, padded) in enumerate(zip(before, sides, strict=True), start=-2):
        # Reflection without the edge, over and over.
        period = max(1, 2 * y.shape[dim] - 2)
        place = (torch.arange(padded) - start).remainder(period)
        y = y.index_select(dim, torch.minimum(place, period - place))
    pre_padded = Scattering2D(J, shape, L, max_order, pre_pad=True)(y)
    torch.testing.assert_close(pre_padded, found, rtol=0, atol=1e-5 * float(y.abs().max()))


@cases(
    40,
    400,
    images=image_batches(1, 40, st.just(0)),
    resize=st.one_of(st.none(), st.integers(1, 30), st.tuples(*[st.integers(1, 30)] * 2)),
    crop=st.one_of(st.none(), st.tuples(*[st.integers(1, 30)] * 2)),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
    flip=st.booleans(),
    quantize=st.booleans(),
)
def test_teachers_preprocessing_is_torchvisions(
    images, resize, crop, interpolation, flip, quantize
):
    from torchvision.transforms import functional

    channels = images.shape[1]
    mean, std = [0.1 * (i + 1) for i in range(channels)], [0.2 + 0.1 * i for i in range(channels)]
    x = images.tensor().float()
    if isinstance(resize, int) and max(x.shape[2:]) * resize // min(x.shape[2:]) > 200:
        return
    prepare = TeacherPreprocessing(
        resize, crop, tuple(mean), tuple(std), interpolation, flip_channels=flip
    )
    found = prepare(x, quantize=quantize)
    expected = images.numbers().float()
    if resize is not None:
        mode = functional.InterpolationMode(interpolation)
        expected = functional.resize(
            expected, [resize] if isinstance(resize, int) else resize, mode
        )
    if 1 in (x.shape[3], expected.shape[3]):
        return  # one pixel wide: torch's own answers for the two layouts differ
    expected = expected.clamp(0, 1)
    if quantize:
        expected = (255 * expected).round() / 255
    if crop is not None:
        expected = functional.center_crop(expected, crop)
    expected = functional.normalize(expected.flip(1) if flip else expected, mean, std)
    assert found.shape == expected.shape
    # A rounding to 8 bits may go the other way.
    differ = (found - expected).abs() > 1e-4
    assert differ.double().mean() <= (0.01 if quantize else 0)
    assert (found - expected).abs().max() <= 1.01 / 255 / min(std)


@cases(
    40,
    600,
    names=st.lists(st.sampled_from(sorted(SMALL)), min_size=1, unique=True),
    images=image_batches(8, 24, st.integers(-3, 0)),
    slice_size=st.integers(1, 5),
    sketch_dim=st.one_of(st.none(), st.integers(1, 300)),
)
def test_collection_is_each_alone(names, images, slice_size, sketch_dim):
    options = {"slice_size": slice_size, "sketch_dim": sketch_dim, "sketch_seed": 3}
    specification = {name: SMALL[name] for name in names}
    collection = Representations(specification, normalization="none", **options)
    x = images.tensor()
    features = collection(x)
    assert list(features) == names
    sizes = collection.sizes(*images.shape[1:])
    for name, y in features.items():
        expected = representation_class(name)(**SMALL[name])(x).flatten(1)
        if sketch_dim is not None:
            expected = FoldedSignSketch(sketch_dim, seed=3)(expected)
        assert y.shape == (images.shape[0], sizes[name])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(y.abs().max() + 1e-30))


@cases(
    60,
    1000,
    b=batches(st.integers(1, 6), widths=st.integers(1, 200)),
    dim=st.integers(1, 64),
    seed=st.integers(0, 2**64 - 1),
)
def test_sketch_is_the_definition(b, dim, seed):
    """By the kernel and without it, which add in one order: to the last bit."""
    x = b.tensor()
    found = folded_sign_sketch(x, dim, seed)
    y = b.numbers()
    y = y.to(torch.promote_types(y.dtype, torch.float32)).numpy()
    width = y.shape[1]
    if width <= dim:
        assert np.array_equal(found.resolve_neg().numpy(), y)
        return
    signs = random_signs(seed, 0, width).numpy().astype(y.dtype)
    count = -(-width // dim)
    rotations = (random_bits(seed, 2**62, count) % dim).tolist()
    expected = np.zeros((len(y), dim))
    for i, rotation in enumerate(rotations):
        for j in range(i * dim, min((i + 1) * dim, width)):
            expected[:, (j - i * dim + rotation) % dim] += signs[j] * y[:, j].astype(float)
    module = FoldedSignSketch(dim, seed)
    assert not module.state_dict()
    assert torch.equal(module(x), found)
    assert torch.equal(torch.cat([module(x[:1]), module(x[1:])]) if len(y) > 1 else found, found)
    limit = float(np.abs(y).max()) * count
    precision = 1e-14 if y.dtype == np.float64 else 1e-6
    assert np.abs(found.numpy() - expected).max() <= precision * limit + 1e-44
    leaf = b.tensor(requires_grad=True)
    with_gradient = folded_sign_sketch(leaf, dim, seed)  # no kernel
    assert torch.equal(with_gradient.detach(), found)
    (slope,) = torch.autograd.grad(with_gradient.sum(), leaf)
    assert set(slope.flatten().tolist()) <= {-1.0, 1.0}


@cases(
    60,
    500,
    images=image_batches(sizes=st.integers(-5, 5)),
    mean=st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    std=st.lists(st.floats(1e-3, 10), min_size=5, max_size=5),
)
def test_normalization_is_undone(images, mean, std):
    channels = images.shape[1]
    normalization = Normalization(mean[:channels], std[:channels])
    x = images.numbers().to(torch.promote_types(images.dtype, torch.float32))
    there = normalization.apply(x)
    back = normalization.undo(there)
    size = max(1.0, float(x.abs().max()))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5 * size)
    shape = (1, channels, 1, 1)
    expected = (x.numpy() - np.reshape(mean[:channels], shape)) / np.reshape(std[:channels], shape)
    np.testing.assert_allclose(there.numpy(), expected, rtol=1e-4, atol=1e-3)


@cases(
    30,
    300,
    b=batches(st.integers(2, 8), sizes=st.integers(-3, 3), dtypes=DTYPES[2:]),
    hidden=st.integers(1, 9),
    out=st.integers(1, 9),
    layers=st.integers(1, 4),
)
def test_head(b, hidden, out, layers):
    x = b.tensor(requires_grad=True)
    torch.manual_seed(0)
    head = MVMRProjectionHead(x.shape[1], hidden, out, layers).to(x.dtype)
    z = head(x.flatten(1))
    assert z.shape == (b.n, out)
    gradients = torch.autograd.grad(z.square().sum(), [x, *head.parameters()])
    assert all(torch.isfinite(t).all() for t in (z, *gradients))
    assert sum(p.numel() for p in head.parameters() if p.ndim == 2) == sum(
        a * c
        for a, c in zip(
            [x.shape[1], *[hidden] * (layers - 1)], [*[hidden] * (layers - 1), out], strict=True
        )
    )


def test_every_representation_is_in_the_collections():
    assert set(SMALL) == set(OPTIONS) < set(list_representations())


@cases(40, 400, images=image_batches(), cells=st.integers(1, 4))
def test_local_binary_patterns(images, cells):
    """Shares of patterns, those of a reference by shifted copies, whatever the images' size."""
    x = images.tensor()
    if min(x.shape[2:]) < cells + 2:
        with pytest.raises(ValueError, match="must be at least"):
            local_binary_patterns(x, cells)
        return
    found = local_binary_patterns(x, cells)
    assert found.dtype == torch.promote_types(x.dtype, torch.float32)
    torch.testing.assert_close(found.sum(dim=3), torch.ones_like(found[..., 0]))
    if x.shape[1] == 3:  # weights of the colours, rounded otherwise in the reference
        return
    grey = x.to(found.dtype).mean(dim=1)
    before, same, after = slice(0, -2), slice(1, -1), slice(2, None)
    middle = grey[:, same, same]
    above = [(before, before), (before, same), (before, after), (same, after)]
    below = [(after, after), (after, same), (after, before), (same, before)]
    bits = [grey[:, i, j] >= middle for i, j in (*above, *below)]
    pattern = sum(bit.long() << k for k, bit in enumerate(bits))
    rows = torch.arange(pattern.shape[1]) * cells // pattern.shape[1]
    columns = torch.arange(pattern.shape[2]) * cells // pattern.shape[2]
    for i in range(cells):
        for j in range(cells):
            part = pattern[:, rows == i][:, :, columns == j].flatten(1)
            shares = torch.nn.functional.one_hot(part, 256).to(found.dtype).mean(dim=1)
            torch.testing.assert_close(found[:, i, j], shares)

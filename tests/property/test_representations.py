"""Representations, sketches, normalisation and heads on drawn images of any size, type and strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mvmr_loss import MVMRProjectionHead, Normalization, Representations
from mvmr_loss._random import random_bits, random_signs
from mvmr_loss.representations import folded_sign_sketch
from mvmr_loss.representations.registry import representation_class
from tests.property.cases import DTYPES, batches, cases
from tests.property.images import image_batches, representations


@cases(60, 1200, representation=representations(), images=image_batches(), gradient=st.booleans())
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
    30,
    600,
    names=st.lists(st.sampled_from(["pixels", "dct", "local_std", "hog"]), min_size=1, unique=True),
    images=image_batches(8, 24, st.integers(-3, 1)),
    slice_size=st.integers(1, 5),
    sketch_dim=st.one_of(st.none(), st.integers(1, 300)),
)
def test_collection_is_each_alone(names, images, slice_size, sketch_dim):
    collection = Representations(names, slice_size=slice_size, sketch_dim=sketch_dim, sketch_seed=3)
    x = images.tensor()
    features = collection(x)
    assert list(features) == names
    sizes = collection.sizes(*images.shape[1:])
    for name, y in features.items():
        expected = representation_class(name)()(x).flatten(1)
        if sketch_dim is not None:
            expected = folded_sign_sketch(expected, sketch_dim, 3)
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

"""The scattering of patches against that of each patch alone."""

import math

import pytest
import torch

from mvmr_loss import Representations
from mvmr_loss.representations import PatchScattering, Scattering, patch_scattering, scattering


def make_images(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "options", "grid_size"),
    [
        ((2, 3, 32, 32), {}, 4),
        ((1, 1, 96, 96), {"J": 3, "L": 4}, 4),
        ((2, 2, 37, 51), {"J": 2, "L": 6}, 3),
        ((1, 3, 20, 17), {"J": 1, "L": 4, "max_order": 1}, 4),
    ],
)
def test_equals_each_patch_alone(shape, options, grid_size):
    images = make_images(*shape)
    features = patch_scattering(images, **options, grid_size=grid_size)
    height, width = shape[2] // grid_size, shape[3] // grid_size
    for row in range(grid_size):
        for column in range(grid_size):
            top, left = row * height, column * width
            patch = images[:, :, top : top + height, left : left + width]
            torch.testing.assert_close(features[:, :, row, column], scattering(patch, **options))


def test_one_patch_is_the_image():
    images = make_images(2, 3, 24, 21)
    features = patch_scattering(images, grid_size=1)
    torch.testing.assert_close(features[:, :, 0, 0], scattering(images))


def test_a_patch_sees_no_other():
    images = make_images(1, 1, 32, 32)
    changed = images.clone()
    changed[..., :8, 8:16] += 1
    differs = (patch_scattering(images) != patch_scattering(changed)).flatten(4).any(-1)[0, 0]
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 1] = True
    assert torch.equal(differs, expected)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 16, 16), (2, 5, 39, 18)])
@pytest.mark.parametrize("options", [{}, {"J": 1, "L": 3}, {"max_order": 1, "grid_size": 2}])
def test_cardinality(shape, options):
    module = PatchScattering(**options)
    features = module(make_images(*shape))
    assert features.shape == (shape[0], *module.output_shape(*shape[1:]))
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()


def test_as_many_numbers_as_the_whole_image_where_the_sizes_divide():
    of_patches = math.prod(PatchScattering().output_shape(3, 96, 96))
    assert of_patches == math.prod(Scattering().output_shape(3, 96, 96)) == 139_968


def test_by_name():
    images = make_images(3, 3, 32, 40)
    representations = Representations({"patch_scattering": {"J": 1, "L": 4, "grid_size": 2}})
    features = representations(images)["patch_scattering"]
    torch.testing.assert_close(features, patch_scattering(images, 1, 4, grid_size=2).flatten(1))
    assert representations.sizes(3, 32, 40) == {"patch_scattering": features.shape[1]}


def test_module_single_batch_and_strides():
    images = make_images(4, 3, 32, 40)
    module = PatchScattering()
    expected = patch_scattering(images)
    torch.testing.assert_close(module(images), expected)
    torch.testing.assert_close(module(images[1]), expected[1:2])
    torch.testing.assert_close(module(images.mT.contiguous().mT), expected)
    torch.testing.assert_close(module(images.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(torch.cat([module(part) for part in images.split(3)]), expected)


def test_half_precision_and_autocast():
    images = make_images(2, 3, 32, 32).half()
    expected = patch_scattering(images.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = PatchScattering()(images)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)


def test_gradcheck():
    images = make_images(1, 1, 9, 8, dtype=torch.float64).requires_grad_()
    module = PatchScattering(J=2, L=2, grid_size=2, differentiable=True)
    assert torch.autograd.gradcheck(module, images)
    assert not PatchScattering()(make_images(1, 1, 16, 16).requires_grad_()).requires_grad


@pytest.mark.parametrize("differentiable", [False, True])
def test_compile(differentiable):
    images = make_images(2, 3, 17, 20).requires_grad_(differentiable)
    module = PatchScattering(differentiable=differentiable)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    features = compiled(images)
    torch.testing.assert_close(features, module(images))
    assert features.requires_grad == differentiable


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid_size": 0}, ValueError, "grid_size must be at least 1 but is 0"),
        ({"grid_size": (4, 4)}, TypeError, "grid_size must be an int but is a tuple"),
        ({"J": 0}, ValueError, "J must be at least 1 but is 0"),
        ({"max_order": 0}, ValueError, "max_order must be one of 1, 2 but is 0"),
    ],
)
def test_exception(options, error, message):
    with pytest.raises(error, match=message):
        PatchScattering(**options)
    with pytest.raises(error, match=message):
        patch_scattering(make_images(1, 1, 32, 32), **options)


def test_too_small():
    assert patch_scattering(make_images(1, 1, 16, 16)).shape == (1, 1, 4, 4, 81, 1, 1)
    message = "images must be at least 16 x 16 pixels .* but are 40 x 15"
    for extract in (patch_scattering, PatchScattering()):
        with pytest.raises(ValueError, match=message):
            extract(make_images(1, 1, 40, 15))
    with pytest.raises(ValueError, match="at least 24 x 24 pixels"):
        patch_scattering(make_images(1, 1, 23, 23), J=3, grid_size=3)
    with pytest.raises(ValueError, match="images for patch_scattering must be at least 16 x 16"):
        Representations(["patch_scattering"]).sizes(3, 15, 40)

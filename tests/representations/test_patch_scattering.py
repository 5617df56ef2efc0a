"""The scattering of patches against that of each patch alone."""

import math

import pytest
import torch

from mvmr_loss import Representations
from mvmr_loss.representations import PatchScattering, Scattering, patch_scattering, scattering
from tests.representations.tester import RepresentationTester


class TestPatchScattering(RepresentationTester):
    module = PatchScattering
    function = staticmethod(patch_scattering)
    options = {"J": 2, "L": 2, "max_order": 2, "grid_size": 2}
    second_order = False
    wrong = [
        ({"grid_size": 0}, ValueError, "grid_size must be at least 1 but is 0"),
        ({"grid_size": (4, 4)}, TypeError, "grid_size must be an int but is a tuple"),
        ({"J": 0}, ValueError, "J must be at least 1 but is 0"),
        ({"max_order": 0}, ValueError, "max_order must be one of 1, 2 but is 0"),
    ]


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

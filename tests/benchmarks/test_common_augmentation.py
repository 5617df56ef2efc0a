"""The augmentation of a whole batch at once."""

import torch

from benchmarks.common.augmentation import augment


def test_augmentation():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 16, 16)
    augmented = augment(images)
    assert augmented.shape == images.shape
    assert 0 <= augmented.min() <= augmented.max() <= 1
    assert not torch.equal(augmented, augment(images))
    # Of one colour: no crop shows, and without jitter nothing changes.
    flat = torch.rand(64, 3, 1, 1).expand(-1, -1, 16, 16)
    torch.testing.assert_close(augment(flat, 0.0), flat, rtol=0, atol=1e-5)
    grey = torch.full((64, 3, 16, 16), 0.5)
    changed = augment(grey, 0.4)
    torch.testing.assert_close(changed[:, 0], changed[:, 1], rtol=0, atol=1e-3)  # no hue to turn
    brightness = changed.mean(dim=(1, 2, 3))
    assert 0.29 < brightness.min() < 0.4
    assert 0.6 < brightness.max() < 0.71


def test_crops_have_the_size_and_the_part_that_are_asked_for():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)
    crops = augment(ramp, 0.0, size=16, scale=(0.1, 0.2))
    assert crops.shape == (64, 3, 16, 16)
    seen = (crops[..., -1] - crops[..., 0]).abs().mean(dim=(1, 2))
    # A crop of a fifth of the area and a ratio of 4 / 3 sees about half of the width.
    assert seen.max() < 0.6
    assert seen.min() > 0.1
    assert (augment(ramp, 0.0)[..., -1] - augment(ramp, 0.0)[..., 0]).abs().max() > 0.6


def test_as_many_images_are_made_grey_as_is_said():
    torch.manual_seed(0)
    images = torch.rand(400, 3, 4, 4)

    def grey_ones(**options):
        augmented = augment(images, **options)
        return (augmented.amax(dim=1) - augmented.amin(dim=1)).amax(dim=(1, 2)).lt(1e-3).sum()

    assert grey_ones(grey=0.0) == 0
    assert grey_ones(grey=1.0) == 400
    assert 20 <= grey_ones(jitter=0.4) <= 60

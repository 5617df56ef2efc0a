"""Images of any number of channels, such as the 13 bands of a satellite's, in every representation."""

import pytest
import torch
from torch import nn

from mvmr_loss import MVMRLoss, Representations, Teacher, list_representations
from mvmr_loss.representations import augmented_pixels

# As the package knows them; other tests register their own.
NAMES = ["augmented_pixels", "dct", "hog", "local_binary_patterns", "local_std"]
NAMES += ["patch_scattering", "pixels", "scattering"]
BANDS = 13
STATISTICS = ([0.3 + 0.02 * band for band in range(BANDS)], [0.2] * BANDS)


def images(channels=BANDS, n=4):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, 24, 16, generator=generator) - 0.5


def test_the_names_are_all():
    assert set(NAMES) <= set(list_representations())


@pytest.mark.parametrize("normalization", ["imagenet", "none", STATISTICS], ids=["3", "0", "13"])
@pytest.mark.parametrize("channels", [1, 2, 13])
def test_every_representation_has_a_row_for_each_image(channels, normalization):
    specification = [name for name in NAMES if name != "patch_scattering"]
    representations = Representations(
        {**dict.fromkeys(specification), "patch_scattering": {"J": 1}}, normalization=normalization
    )
    features = representations(images(channels))
    sizes = representations.sizes(channels, 24, 16)
    assert list(features) == [*specification, "patch_scattering"]
    for name, y in features.items():
        assert y.shape == (4, sizes[name])
        assert torch.isfinite(y).all()
        assert y.std() > 0


# Local binary patterns are those of all bands' mean.
ALIKE = ("augmented_pixels", "local_binary_patterns")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIKE])
def test_each_band_is_represented_by_itself(name):
    options = {"J": 1} if name == "patch_scattering" else {}
    representations = Representations({name: options})
    x = images()
    together = representations(x)[name].unflatten(1, (BANDS, -1))
    for band in (0, 6, 12):
        alone = representations(x[:, band : band + 1])[name]
        torch.testing.assert_close(together[:, band], alone, rtol=1e-5, atol=1e-5)


def test_all_bands_are_cropped_and_flipped_alike():
    x = images(1).expand(-1, BANDS, -1, -1)
    augmented = augmented_pixels(x, seed=3, normalization=STATISTICS)
    torch.testing.assert_close(augmented, augmented[:, :1].expand(-1, BANDS, -1, -1))
    assert not torch.equal(augmented, x)


@pytest.mark.parametrize("statistics", [((0.5,), (0.5,)), STATISTICS], ids=["1", "13"])
def test_colours_need_the_statistics_of_three_channels(statistics):
    representations = Representations(["augmented_pixels"], normalization=statistics)
    with pytest.raises(ValueError, match="must be of three channels, as the images are, but is"):
        representations(images(3))


def test_a_teacher_of_the_bands_and_the_loss():
    network = nn.Sequential(nn.Conv2d(BANDS, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = Teacher(network)
    representations = Representations({"teacher": teacher, "hog": None}, sketch_dim=256)
    features = representations(images())
    torch.testing.assert_close(features["teacher"], network(images()))
    assert features["hog"].shape == (4, 256)
    z, z_augmented = torch.randn(2, 4, 6, requires_grad=True).unbind()
    assert torch.isfinite(MVMRLoss()(z, z_augmented, features))

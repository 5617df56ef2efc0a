"""Local binary patterns: against a loop over pixels, and what they promise."""

import pytest
import torch

from mvmr_loss import Representations
from mvmr_loss.representations import LocalBinaryPatterns, local_binary_patterns

NEIGHBOURS = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]


def by_loops(grey, cells):
    """The histograms of one grey image (H, W), pixel by pixel."""
    height, width = grey.shape
    counts = torch.zeros(cells, cells, 256, dtype=torch.float64)
    for i in range(1, height - 1):
        for j in range(1, width - 1):
            bits = [bool(grey[i + a, j + b] >= grey[i, j]) for a, b in NEIGHBOURS]
            pattern = sum(2**k for k, bit in enumerate(bits) if bit)
            row, column = (i - 1) * cells // (height - 2), (j - 1) * cells // (width - 2)
            counts[row, column, pattern] += 1
    return counts / counts.sum(dim=2, keepdim=True)


@pytest.mark.parametrize(("size", "cells"), [((8, 8), 1), ((9, 12), 2), ((11, 7), 3), ((4, 5), 2)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_it_counts_the_patterns_of_each_pixel(size, cells, channels):
    # Few levels: neighbours are often equally bright.
    images = torch.randint(0, 4, (3, channels, *size)).float()
    found = local_binary_patterns(images, cells)
    assert found.shape == (3, cells, cells, 256)
    for image, histograms in zip(images, found, strict=True):
        torch.testing.assert_close(histograms.double(), by_loops(image.mean(0), cells))


def test_rgb_is_turned_grey_as_it_is_seen():
    images = torch.rand(2, 3, 10, 10)
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    for image, histograms in zip(grey, local_binary_patterns(images), strict=True):
        torch.testing.assert_close(histograms.double(), by_loops(image, 2))


def test_brightness_and_contrast_change_nothing():
    images = torch.randint(0, 256, (4, 1, 16, 16)).float()
    torch.testing.assert_close(
        local_binary_patterns(images), local_binary_patterns(images * 0.5 + 7), rtol=0, atol=0
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (4, 5)])
def test_nan_where_values_are_not_looked_at(value, place):
    images = torch.rand(2, 3, 8, 8)
    images[0, 0][place] = value
    found = torch.compile(LocalBinaryPatterns(), backend="eager")(images)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], local_binary_patterns(images[1:]), rtol=0, atol=0)


def test_a_single_image_half_precision_and_float64():
    image = torch.rand(3, 8, 8)
    assert local_binary_patterns(image).shape == (1, 2, 2, 256)
    assert local_binary_patterns(image.half()).dtype == torch.float32
    assert local_binary_patterns(image.double()).dtype == torch.float64


def test_no_gradient_is_recorded_and_none_can_be_asked_for():
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert not local_binary_patterns(images).requires_grad
    assert not LocalBinaryPatterns()(images).requires_grad
    with pytest.raises(ValueError, match="differentiable must be False for local_binary_patterns"):
        LocalBinaryPatterns(differentiable=True)
    with pytest.raises(ValueError, match="differentiable must be False for local_binary_patterns"):
        Representations(["local_binary_patterns"], differentiable=True)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="cells must be at least 1 but is 0"):
        LocalBinaryPatterns(cells=0)
    with pytest.raises(TypeError, match="cells must be an int"):
        local_binary_patterns(torch.rand(1, 1, 8, 8), cells=2.0)
    with pytest.raises(ValueError, match="at least 5 x 5 pixels"):
        local_binary_patterns(torch.rand(1, 1, 4, 8), cells=3)
    with pytest.raises(ValueError, match="images must be finite"):
        local_binary_patterns(torch.full((1, 1, 8, 8), torch.nan))


def test_the_collection_knows_it():
    representations = Representations({"fine": {"name": "local_binary_patterns", "cells": 4}})
    features = representations(torch.rand(2, 3, 32, 32))
    assert features["fine"].shape == (2, 4 * 4 * 256)
    assert representations.sizes(3, 32, 32) == {"fine": 4 * 4 * 256}


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("size", [(9, 13), (33, 17), (31, 57)])
def test_flat_images_have_the_flat_pattern(channels, size):
    images = torch.rand(2, channels, 1, 1).expand(-1, -1, *size).contiguous()
    for layout in (images, images.contiguous(memory_format=torch.channels_last)):
        assert local_binary_patterns(layout)[..., 255].min() == 1

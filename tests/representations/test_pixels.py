"""The pixels themselves."""

import torch

from mvmr_loss.representations import Pixels
from tests.representations.tester import RepresentationTester


class TestPixels(RepresentationTester):
    module = Pixels
    shapes = [(4, 3, 8, 8), (1, 1, 1, 5), (2, 7, 3, 2)]

    def test_unchanged(self, shape):
        images = torch.rand(shape)
        assert torch.equal(Pixels()(images), images)

"""What the tests of teachers share: images and small networks."""

from __future__ import annotations

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

from benchmarks.common.photographs import Photographs
from mvmr_loss.teachers import IMAGENET_MEAN, IMAGENET_STD

CIFAR_MEAN, CIFAR_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.261)


def pil_images() -> dict[str, Image.Image]:
    """Photographs of several sizes and shapes."""
    dataset = Photographs("test", crops_per_class=1, crop_size=128, tile_size=128)
    cat, retina = dataset[3][0], dataset[9][0]
    return {
        "square": cat,
        "wide": cat.crop((0, 0, 128, 97)),
        "tall": retina.crop((10, 0, 91, 128)),
        "small": cat.crop((40, 40, 72, 72)),
    }


IMAGES = pil_images()


def as_student_sees(image: Image.Image, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> torch.Tensor:
    """What a student's loader gives: a normalised batch of one."""
    return TF.normalize(TF.to_dtype(TF.to_image(image), torch.float32, scale=True), mean, std)[None]


class Own(nn.Module):
    """A network with tokens, dropout and BatchNorm, to tell training mode from evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(images).mean(dim=1))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        return self.stem(images).flatten(2).transpose(1, 2)


class Tokens(Own):
    """Gives its tokens."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens(images)

"""MV-MR on images of 13 bands: everything takes any number of channels.

    python examples/many_bands.py

The bands are mixtures of a photograph's colours, in place of a satellite's; the photographs are those
that scikit-image brings. Statistics are those of images in [0, 1], one number a band: reflectances of
0 to 10000 are divided by 10000 first.
"""

import argparse

import torch
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms import v2 as T

from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations

BANDS = 13


def bands(count, size=64):
    """Random crops of five photographs, (count, 13, size, size) in [0, 1]."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    crop = T.Compose([T.RandomCrop(size), T.ToImage(), T.ToDtype(torch.float32, scale=True)])
    colours = torch.stack([crop(Image.fromarray(pictures[i % 5])) for i in range(count)])
    # What each band sees of red, green and blue: a window that moves along the spectrum.
    place = torch.linspace(0, 2, BANDS)[:, None]
    sensitivity = (1 - (place - torch.arange(3)).abs()).clamp(min=0)
    return torch.einsum("bc,nchw->nbhw", sensitivity, colours)


def main():
    """Trains, and prints the loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    torch.manual_seed(0)
    images = bands(8 * settings.batch_size)
    mean, std = images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3))
    normalize = T.Normalize(mean.tolist(), std.tolist())

    backbone = resnet18()
    backbone.conv1 = torch.nn.Conv2d(BANDS, 64, 7, stride=2, padding=3, bias=False)
    backbone.fc = torch.nn.Identity()
    head = MVMRProjectionHead(512, hidden_dim=512, output_dim=512)
    # Each band is represented by itself; where there are no colours, none are jittered.
    names = ["pixels", "augmented_pixels", "scattering", "hog", "local_std"]
    representations = Representations(names, normalization=(mean.tolist(), std.tolist()))
    for name, size in representations.sizes(BANDS, 64, 64).items():
        print(f"{name}: {size} numbers an image")
    criterion = MVMRLoss()
    augment = T.Compose([T.RandomResizedCrop(64, (0.2, 1.0)), T.RandomHorizontalFlip()])
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-3)

    step = 0
    while step < settings.steps:
        for batch in DataLoader(images, settings.batch_size, shuffle=True):
            view = normalize(batch)
            view_augmented = normalize(torch.stack([augment(image) for image in batch]))
            z, z_augmented = head(backbone(view)), head(backbone(view_augmented))
            loss = criterion(z, z_augmented, representations(view))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0 or step == settings.steps:
                print(f"step {step:>4}, loss {loss.item():.4f}", flush=True)
            if step == settings.steps:
                break


if __name__ == "__main__":
    main()

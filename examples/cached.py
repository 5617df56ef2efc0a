"""Representations that are computed once per image, kept on disk, and read back by index.

    python examples/cached.py --store features

The first epoch fills the folder; later epochs, and later runs with the same folder, read it.
"""

import argparse
import tempfile
import time

import torch
from PIL import Image
from skimage import data
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2 as T

from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations
from mvmr_loss.cache import IndexedDataset

NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
AUGMENT = T.Compose([T.RandomResizedCrop(96, (0.3, 1.0)), T.RandomHorizontalFlip()])


def photographs(count, size=96):
    """Random crops, (count, 3, size, size) in [0, 1]."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    crop = T.Compose([T.RandomCrop(size), T.ToImage(), T.ToDtype(torch.float32, scale=True)])
    return torch.stack([crop(Image.fromarray(pictures[i % len(pictures)])) for i in range(count)])


def main():
    """Trains, and says how long each epoch's representations took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--store", help="the folder; one that is thrown away if not given")
    settings = parser.parse_args()
    torch.manual_seed(0)

    # Samples begin with their index: the same image has the same index in every epoch and run.
    dataset = IndexedDataset(photographs(4 * settings.batch_size))
    loader = DataLoader(dataset, settings.batch_size, shuffle=True, drop_last=True)
    representations = Representations(
        ["pixels", "scattering", "hog", "local_std"],
        sketch_dim=1024,
        cache={"path": settings.store or tempfile.mkdtemp(), "dataset": dataset},
    )
    backbone = nn.Sequential(
        *(nn.Conv2d(3, 32, 5, stride=4), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 128, 5, stride=4), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    head = MVMRProjectionHead(128, hidden_dim=256, output_dim=256)
    criterion = MVMRLoss()
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-3)

    step = 0
    while step < settings.steps:
        seconds = 0.0
        for index, batch in loader:
            # The image as it is, the same in every epoch; and augmented.
            view = NORMALIZE(batch)
            view_augmented = NORMALIZE(torch.stack([AUGMENT(image) for image in batch]))
            start = time.perf_counter()
            features = representations(view, index)
            seconds += time.perf_counter() - start
            loss = criterion(head(backbone(view)), head(backbone(view_augmented)), features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == settings.steps:
                break
        print(
            f"step {step:>4}, loss {loss.item():.4f}, representations {seconds:.3f} s", flush=True
        )


if __name__ == "__main__":
    main()

"""An ordinary lightly VICReg script with the representation terms of MV-MR added to its loss.

    python examples/add_to_vicreg.py

The lines that end in ``# MV-MR`` are all that is added; without them it is plain VICReg.
Besides ``.[examples]`` it needs lightly: ``pip install '.[lightly]'``.
"""

import argparse

import torch
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms.multi_view_transform import MultiViewTransform  # MV-MR
from lightly.transforms.vicreg_transform import VICRegTransform
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import RandomCrop

from mvmr_loss import MultiRepresentationRegularizer, Representations  # MV-MR
from mvmr_loss.adapters.lightly import NonAugmentedViewTransform  # MV-MR


class Photographs(Dataset):
    """Random crops of photographs that scikit-image brings, and which one each is from."""

    def __init__(self, count, size=64, transform=None):
        pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
        self.labels = [i % len(pictures) for i in range(count)]
        self.crops = [RandomCrop(size)(Image.fromarray(pictures[label])) for label in self.labels]
        self.transform = transform

    def __len__(self):
        return len(self.crops)

    def __getitem__(self, index):
        return self.transform(self.crops[index]), self.labels[index]


def main():
    """Trains, and prints the loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    torch.manual_seed(0)

    backbone = resnet18()
    backbone.fc = torch.nn.Identity()
    projection_head = VICRegProjectionHead(512, hidden_dim=512, output_dim=512)
    model = torch.nn.Sequential(backbone, projection_head)
    criterion = VICRegLoss()
    names = ["pixels", "scattering", "hog", "local_std"]  # MV-MR
    representations = Representations(names)  # MV-MR
    regularizer = MultiRepresentationRegularizer()  # MV-MR

    transform = VICRegTransform(input_size=64, gaussian_blur=0.0)
    views = [NonAugmentedViewTransform(64), *transform.transforms]  # MV-MR
    transform = MultiViewTransform(views)  # MV-MR
    dataset = Photographs(8 * settings.batch_size, transform=transform)
    loader = DataLoader(dataset, settings.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)

    step = 0
    while step < settings.steps:
        for views, _ in loader:
            x0, x1 = views[-2:]
            z0, z1 = model(x0), model(x1)
            loss = criterion(z0, z1)
            loss = loss + regularizer([z0, z1], representations(views[0]))  # MV-MR
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

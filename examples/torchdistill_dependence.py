"""Distillation in torchdistill by regression and dependence, on photographs that scikit-image brings.

    python examples/torchdistill_dependence.py

By ``distillation.yaml``, which comes with the package, from fixed features, stored before the training;
``--teacher resnet50`` adds a network of timm's, whose weights are downloaded. Besides ``.[examples]`` it
needs the host: ``pip install '.[torchdistill]'``.
"""

import argparse
import importlib.resources
import tempfile

import torch
from PIL import Image
from skimage import data
from torch.utils.data import Dataset
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model
from torchvision.transforms import v2 as T

from mvmr_loss.cache import fill

CONFIGURATIONS = importlib.resources.files("mvmr_loss.adapters.torchdistill.configs")


class Photographs(Dataset):
    """Random crops of five photographs, and which one each is from."""

    def __init__(self, count, size=64):
        pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
        self.labels = [i % len(pictures) for i in range(count)]
        self.crops = [T.RandomCrop(size)(Image.fromarray(pictures[label])) for label in self.labels]
        normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.plain = T.Compose([T.ToImage(), T.ToDtype(torch.float32, scale=True), normalize])
        augment = [T.RandomResizedCrop(size, (0.2, 1.0)), T.RandomHorizontalFlip()]
        self.transform = T.Compose([*augment, self.plain])

    def __len__(self):
        return len(self.crops)

    def __getitem__(self, index):
        return (self.transform or Image.Image.copy)(self.crops[index]), self.labels[index]


@torch.no_grad()
def accuracy(model, photographs):
    """Percentage of the crops, as they are, that are told to be of the right photograph."""
    images = torch.stack([photographs.plain(crop) for crop in photographs.crops])
    right = model.eval()(images).argmax(dim=1) == torch.tensor(photographs.labels)
    return 100 * right.float().mean().item()


def main():
    """Trains, and prints the loss of each epoch and the student's accuracy on other crops."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--teacher", help="a model of timm's, such as resnet50")
    settings = parser.parse_args()
    torch.manual_seed(0)
    config = load_yaml_file(str(CONFIGURATIONS / "distillation.yaml"))
    import_dependencies(config["dependencies"])
    steps = min(8, settings.steps)  # an epoch
    photographs = Photographs(steps * settings.batch_size)
    options = config["models"]["teacher_model"]["kwargs"]
    options |= {"representations": ["scattering", "hog"], "sketch_dim": 1024}
    if settings.teacher:
        network = {"name": "teacher", "source": "timm", "model": settings.teacher}
        options["representations"].append({**network, "weights": "default"})
    options["cache"] = {"path": tempfile.mkdtemp(), "num_samples": len(photographs)}
    config["models"]["student_model"]["kwargs"]["num_classes"] = 5
    train = config["train"]
    train["train_data_loader"]["kwargs"]["batch_size"] = settings.batch_size
    train["num_epochs"] = -(-settings.steps // steps)

    teacher = get_model(config["models"]["teacher_model"]["key"], **options)
    fill(teacher.representations, torch.stack([photographs.plain(x) for x in photographs.crops]))
    heads = train["student"]["auxiliary_model_wrapper"]["kwargs"]
    # Handcrafted features are standardised coordinate by coordinate.
    heads |= {"teacher_dims": teacher.representations.sizes(3, 64, 64), "scale": "coordinate"}
    student = get_image_classification_model(config["models"]["student_model"])
    data_sets, device = {"train": photographs}, torch.device("cpu")
    box = get_distillation_box(teacher, student, data_sets, train, device, None, False, 1)
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(images, labels, supplement)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
        print(f"step {steps * (epoch + 1):>4}, loss {loss.item():.4f}", flush=True)
    print(f"student: {accuracy(box.student_model, Photographs(200)):.1f} % of the crops")


if __name__ == "__main__":
    main()

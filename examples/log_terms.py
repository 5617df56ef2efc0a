"""The terms of the loss in a CSV file, TensorBoard and Weights & Biases, by Lightning's loggers.

    python examples/log_terms.py --logger csv tensorboard

Weights & Biases (``--logger wandb``) is written offline here: no account is needed. What is
logged is one flat dictionary, so any other logger does as well. Besides ``.[examples]`` it needs
lightning and the loggers' own packages: ``pip install lightning tensorboard wandb``.
"""

import argparse

import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from skimage import data
from torch import nn
from torchvision.transforms import v2 as T

from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations

NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
AUGMENT = T.Compose([T.RandomResizedCrop(64, (0.3, 1.0)), T.RandomHorizontalFlip()])


def loggers(names, folder):
    """Returns Lightning's loggers; they work without a Trainer, too."""
    make = {
        "csv": lambda: CSVLogger(folder, flush_logs_every_n_steps=1),
        "tensorboard": lambda: TensorBoardLogger(folder),
        "wandb": lambda: WandbLogger(save_dir=folder, offline=True),
    }
    return [make[name]() for name in names]


def main():
    """Trains, and logs every step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    choices = ["csv", "tensorboard", "wandb"]
    parser.add_argument("--logger", nargs="+", default=["csv"], choices=choices)
    parser.add_argument("--folder", default="runs")
    settings = parser.parse_args()
    torch.manual_seed(0)

    photograph = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    crop = T.RandomCrop(64)
    backbone = nn.Sequential(
        *(nn.Conv2d(3, 64, 5, stride=4), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    head = MVMRProjectionHead(64, hidden_dim=128, output_dim=128)
    representations = Representations(["pixels", "scattering", "hog", "local_std"])
    criterion = MVMRLoss()
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-3)
    writers = loggers(settings.logger, settings.folder)

    for step in range(1, settings.steps + 1):
        batch = torch.stack([crop(photograph) for _ in range(settings.batch_size)])
        view = NORMALIZE(batch)
        view_augmented = NORMALIZE(torch.stack([AUGMENT(image) for image in batch]))
        z, z_augmented = head(backbone(view)), head(backbone(view_augmented))
        components = criterion.forward_components(z, z_augmented, representations(view))
        optimizer.zero_grad()
        components.total.backward()
        optimizer.step()

        # Every weighted term by name. In a LightningModule: self.log_dict(components.as_dict(...)).
        terms = {name: term.item() for name, term in components.as_dict("train/").items()}
        for writer in writers:
            writer.log_metrics(terms, step)
        if step % 10 == 0 or step == settings.steps:
            print(f"step {step:>4}, loss {terms['train/loss']:.4f}", flush=True)
    for writer in writers:
        writer.finalize("success")


if __name__ == "__main__":
    main()

"""Self-supervised training with MV-MR in lightly, on photographs that scikit-image brings.

    python examples/lightly_mvmr.py

It uses lightly's data set, Lightning's Trainer and ``MVMR``, a method as those of lightly's
benchmarks are, and prints the kNN accuracy before and after. Your own images:
``LightlyDataset("path/to/images", transform=...)``.
Besides ``.[examples]`` it needs lightly, with pytorch_lightning: ``pip install '.[lightly]'``.
"""

import argparse

from lightly.data import LightlyDataset
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from pytorch_lightning import Trainer, seed_everything
from skimage import data
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomCrop

from mvmr_loss.adapters.lightly import MVMR, MVMRTransform, NonAugmentedViewTransform


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
    """Trains, and says how good the features are before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    seed_everything(0)

    # The first view is the image as it is, from which the representations are computed.
    transform = MVMRTransform.cifar(64, normalize=IMAGENET_NORMALIZE)
    photographs = Photographs(8 * settings.batch_size)
    dataset = LightlyDataset.from_torch_dataset(photographs, transform=transform)
    loader = DataLoader(dataset, settings.batch_size, shuffle=True, drop_last=True)
    # For the online kNN: the images it learns from, and those it is tested on.
    plain = NonAugmentedViewTransform(64)
    evaluation = [
        DataLoader(LightlyDataset.from_torch_dataset(Photographs(count), transform=plain), 64)
        for count in (8 * settings.batch_size, 100)
    ]
    model = MVMR(
        settings.batch_size,
        num_classes=5,
        knn_k=20,
        backbone="resnet18",
        preset="features",
        hidden_dim=512,
        output_dim=512,
        lr=2e-3,
        warmup_epochs=1,
    )
    trainer = Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        devices=1,
        logger=False,
        enable_checkpointing=False,
    )
    before = trainer.validate(model, evaluation, verbose=False)[1]["val_knn_top1"]
    trainer.fit(model, loader)
    after = trainer.validate(model, evaluation, verbose=False)[1]["val_knn_top1"]
    print(f"kNN accuracy: {100 * before:.1f} % before, {100 * after:.1f} % after")


if __name__ == "__main__":
    main()

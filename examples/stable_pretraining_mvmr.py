"""Self-supervised training with MV-MR in stable-pretraining, on photographs that scikit-image brings.

    python examples/stable_pretraining_mvmr.py

``mvmr`` is the module's forward function; stable-pretraining's own probe, kNN and RankMe watch it. With
``--vicreg`` it is stable-pretraining's VICReg, to whose loss the representation terms are added.
Besides ``.[examples]`` it needs the host: ``pip install '.[stable-pretraining]'``.
"""

import argparse

import lightning
import stable_pretraining as spt
import torch
from PIL import Image
from skimage import data
from stable_pretraining.data import transforms as T
from stable_pretraining.forward import vicreg
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import RandomCrop

import mvmr_loss
from mvmr_loss.adapters.stable_pretraining import mvmr, regularized

STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def photographs(count, batch_size, transform, size=64):
    """A loader of random crops, and which of five photographs each is from."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    crops = [(RandomCrop(size)(Image.fromarray(pictures[i % 5])), i % 5) for i in range(count)]
    dataset = spt.data.FromTorchDataset(crops, names=["image", "label"], transform=transform)
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)


def main():
    """Trains, and prints what the probes say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--vicreg", action="store_true")
    settings = parser.parse_args()
    lightning.seed_everything(0)

    # The first view is the image as it is, of which the representations are.
    plain = T.ToImage(**STATISTICS)
    augmented = T.Compose(
        T.RandomResizedCrop(64, scale=(0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        T.ToImage(**STATISTICS),
    )
    views = T.MultiViewTransform([plain, augmented] + [augmented] * settings.vicreg)
    loader = photographs(8 * settings.batch_size, settings.batch_size, views)
    loader_val = photographs(4 * settings.batch_size, settings.batch_size, plain)

    names = ["scattering", "hog", "local_binary_patterns"]
    representations = mvmr_loss.Representations(names, sketch_dim=1024)
    if settings.vicreg:
        method = {
            "forward": regularized(vicreg),
            "vicreg_loss": spt.losses.VICRegLoss(),
            "loss": mvmr_loss.MultiRepresentationRegularizer(),
        }
    else:
        sizes = representations.sizes(3, 64, 64)
        method = {"forward": mvmr, "loss": mvmr_loss.MVMRLoss.from_preset("features")}
        method["distillation"] = mvmr_loss.DistillationLoss.from_preset("features", 512, sizes)
    module = spt.Module(
        **method,
        backbone=spt.backbone.from_timm("resnet18", pretrained=False, num_classes=0),
        projector=mvmr_loss.MVMRProjectionHead(512, hidden_dim=512, output_dim=512),
        representations=representations,
        optim={"optimizer": {"type": "Adam", "lr": 1e-3}, "scheduler": "ConstantLR"},
    )
    accuracy = {"top1": MulticlassAccuracy(5)}
    of = {"input": "embedding", "target": "label"}
    callbacks = [
        spt.callbacks.OnlineProbe(
            module, "probe", probe=torch.nn.Linear(512, 5), loss=torch.nn.CrossEntropyLoss(),
            optimizer={"type": "Adam", "lr": 1e-3}, metrics=accuracy, **of,
        ),
        spt.callbacks.OnlineKNN(
            "knn", queue_length=256, input_dim=512, num_classes=5, k=10, metrics=accuracy, **of
        ),
        spt.callbacks.RankMe("rankme", "embedding", queue_length=256, target_shape=512),
    ]  # fmt: skip
    trainer = lightning.Trainer(
        max_steps=settings.steps, max_epochs=-1, num_sanity_val_steps=0, callbacks=callbacks,
        accelerator="cpu", logger=False, enable_checkpointing=False,
        val_check_interval=min(settings.steps, len(loader)),
    )  # fmt: skip
    trainer.fit(module, loader, loader_val)
    for name in ("eval/probe_top1", "eval/knn_top1", "rankme"):
        print(f"{name}: {trainer.callback_metrics[name]:.3f}")


if __name__ == "__main__":
    main()

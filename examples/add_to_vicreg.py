"""An ordinary lightly VICReg script with the representation terms of MV-MR added to its loss.

    python -m examples.add_to_vicreg

The lines that end in ``# MV-MR`` are all that is added; without them it is plain VICReg. For images
of one's own: ``--train FOLDER --test FOLDER``, each with one folder of images a class.
"""

import argparse
from pathlib import Path

import torch
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms.multi_view_transform import MultiViewTransform  # MV-MR
from lightly.transforms.vicreg_transform import VICRegTransform
from torch.utils.data import DataLoader
from torchvision.transforms import v2 as T

from benchmarks.common.data import ImageFolder
from benchmarks.common.encoder import SmallResNet
from benchmarks.common.evaluation import extract_features, knn_scores, topk_accuracy
from benchmarks.common.photographs import Photographs
from mvmr_loss import MultiRepresentationRegularizer, Representations  # MV-MR
from mvmr_loss.adapters.lightly import NonAugmentedViewTransform  # MV-MR


def main(arguments=None):
    """Trains; returns the mean loss of each epoch and the kNN accuracy in percent."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, help="folder of training images")
    parser.add_argument("--test", type=Path, help="folder of test images")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def images(split, transform):
        folder = getattr(settings, split)
        if folder is not None:
            return ImageFolder(folder, transform)
        return Photographs(split, transform=transform)

    backbone = SmallResNet()
    projection_head = VICRegProjectionHead(backbone.output_dim, hidden_dim=512, output_dim=512)
    model = torch.nn.Sequential(backbone, projection_head).to(device)
    criterion = VICRegLoss()
    names = ["pixels", "scattering", "hog", "local_std"]  # MV-MR
    representations = Representations(names).to(device)  # MV-MR
    regularizer = MultiRepresentationRegularizer()  # MV-MR

    transform = VICRegTransform(input_size=32, gaussian_blur=0.0)
    views = [NonAugmentedViewTransform(32), *transform.transforms]  # MV-MR
    transform = MultiViewTransform(views)  # MV-MR
    loader = DataLoader(
        images("train", transform), settings.batch_size, shuffle=True, drop_last=True
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)

    losses = []
    for epoch in range(settings.epochs):
        total = 0.0
        for views, _ in loader:
            x0, x1 = (view.to(device) for view in views[-2:])
            z0, z1 = model(x0), model(x1)
            loss = criterion(z0, z1)
            x = views[0].to(device)  # MV-MR
            loss = loss + regularizer([z0, z1], representations(x))  # MV-MR
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        losses.append(float(total / len(loader)))
        print(f"epoch {epoch:>2}, loss {losses[-1]:.4f}")

    to_tensor = T.Compose([T.ToImage(), T.ToDtype(torch.float32, scale=True)])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    plain = T.Compose([T.Resize(32), T.CenterCrop(32), to_tensor, T.Normalize(mean, std)])
    features, labels = {}, {}
    for split in ("train", "test"):
        batches = list(DataLoader(images(split, plain), 256))
        features[split] = extract_features(backbone, (x for x, _ in batches), device)
        labels[split] = torch.cat([y for _, y in batches])
    scores = knn_scores(features["train"], labels["train"], features["test"])
    accuracy = topk_accuracy(scores, labels["test"])["top1"]
    print(f"kNN accuracy {accuracy:.1f} %")
    return losses, accuracy


if __name__ == "__main__":
    main()

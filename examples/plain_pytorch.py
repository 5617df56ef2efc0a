"""Self-supervised training with MV-MR in plain PyTorch, on photographs that scikit-image brings.

    python examples/plain_pytorch.py

What MV-MR adds to an ordinary training loop is marked (1), (2) and (3).
"""

import argparse

import torch
from PIL import Image
from skimage import data
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms import v2 as T

from mvmr_loss import DistillationLoss, MVMRLoss, MVMRProjectionHead, Representations

NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def photographs(count, size=64):
    """Random crops, (count, 3, size, size) in [0, 1], and which photograph each is from."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
    crop = T.Compose([T.RandomCrop(size), T.ToImage(), T.ToDtype(torch.float32, scale=True)])
    labels = torch.arange(count) % len(pictures)
    return torch.stack([crop(Image.fromarray(pictures[label])) for label in labels]), labels


@torch.no_grad()
def nearest_neighbour_accuracy(backbone, images, labels):
    """Percentage of images whose most similar other image is a crop of the same photograph."""
    backbone.eval()
    features = F.normalize(torch.cat([backbone(NORMALIZE(x)) for x in images.split(64)]), dim=1)
    backbone.train()
    similarity = (features @ features.T).fill_diagonal_(-1)
    return 100 * (labels[similarity.argmax(dim=1)] == labels).float().mean().item()


def main():
    """Trains, and says how good the features are before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    torch.manual_seed(0)
    images, labels = photographs(16 * settings.batch_size)
    loader = DataLoader(images, settings.batch_size, shuffle=True, drop_last=True)

    backbone = resnet18()
    backbone.fc = torch.nn.Identity()
    # (1) Fixed features of the images; a loss on the embeddings, and one on the features.
    names = ["scattering", "hog", "local_binary_patterns"]
    representations = Representations(names, sketch_dim=1024)
    criterion = MVMRLoss.from_preset("features")
    on_features = DistillationLoss.from_preset("features", 512, representations.sizes(3, 64, 64))
    head = MVMRProjectionHead(512, hidden_dim=512, output_dim=512)
    trained = torch.nn.ModuleList([backbone, head, on_features])

    augment = T.Compose(
        [T.RandomResizedCrop(64, (0.2, 1.0)), T.RandomHorizontalFlip(), T.ColorJitter(0.2, 0.2)]
    )
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    before = nearest_neighbour_accuracy(backbone, images, labels)
    step = 0
    while step < settings.steps:
        for batch in loader:
            # (2) Two views of each image, through the same network: as it is, and augmented.
            view = NORMALIZE(batch)
            view_augmented = NORMALIZE(torch.stack([augment(image) for image in batch]))
            h, h_augmented = backbone(view), backbone(view_augmented)
            # (3) The representations are those of the view that is not augmented.
            loss = criterion(head(h), head(h_augmented))
            loss = loss + on_features([h, h_augmented], representations(view))

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0 or step == settings.steps:
                print(f"step {step:>4}, loss {loss.item():.4f}", flush=True)
            if step == settings.steps:
                break
    after = nearest_neighbour_accuracy(backbone, images, labels)
    print(f"nearest neighbour of the same photograph: {before:.1f} % before, {after:.1f} % after")


if __name__ == "__main__":
    main()

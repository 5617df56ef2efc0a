"""
A first training
================

A small network learns from crops of five photographs, without labels, in a few seconds. The terms
of the loss are recorded at each step, written to a CSV file and drawn.
"""

import csv
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from skimage import data
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations

_ = torch.manual_seed(0)

# %%
# The data: random crops of photographs. A label says which photograph a crop is from; only the
# evaluation sees it.

pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina()]
pictures = [torch.from_numpy(p).permute(2, 0, 1)[None] / 255 for p in pictures]
labels = torch.arange(320) % len(pictures)
crop = v2.Compose([v2.RandomCrop(64), v2.Resize(32)])
images = torch.cat([crop(pictures[label]) for label in labels])

figure, axes = plt.subplots(1, 10, figsize=(10, 1.2), layout="constrained")
for place, image in zip(axes, images):
    place.imshow(image.permute(1, 2, 0).clamp(0, 1))
    place.set_axis_off()

# %%
# The network, and what MV-MR brings: a projection head, the representations and the loss.


def block(width_in, width):
    convolution = nn.Conv2d(width_in, width, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


backbone = nn.Sequential(
    block(3, 32), block(32, 64), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten()
)
projector = MVMRProjectionHead(128, hidden_dim=256, output_dim=256)
representations = Representations(["pixels", "scattering", "hog", "local_std"])
criterion = MVMRLoss()

normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
augment = v2.Compose(
    [
        v2.RandomResizedCrop(32, (0.3, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.2, 0.2, 0.2),
    ]
)

# %%
# How good are the features? The share of crops whose most similar other crop is of the same
# photograph.


@torch.no_grad()
def accuracy():
    backbone.eval()
    features = F.normalize(backbone(normalize(images)), dim=1)
    backbone.train()
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(dim=1)
    return (labels[nearest] == labels).float().mean().item()


print(f"untrained: {accuracy():.1%}")

# %%
# The training is an ordinary loop. ``forward_components`` gives the loss and its terms,
# ``as_dict`` one flat dictionary of them, which every logger takes.

optimizer = torch.optim.Adam([*backbone.parameters(), *projector.parameters()], lr=2e-3)
history = []
for _ in range(8):
    for batch in images[torch.randperm(len(images))].split(64):
        view = normalize(batch)
        view_augmented = normalize(torch.stack([augment(image) for image in batch]))
        z, z_augmented = projector(backbone(view)), projector(backbone(view_augmented))
        components = criterion.forward_components(z, z_augmented, representations(view))
        optimizer.zero_grad()
        components.total.backward()
        optimizer.step()
        history.append({name: term.item() for name, term in components.as_dict().items()})

print(f"trained:   {accuracy():.1%}")

# %%
# The terms, in a file and as a picture.

path = Path(tempfile.mkdtemp()) / "terms.csv"
with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(history[0]))
    writer.writeheader()
    writer.writerows(history)
print(path.read_text()[:200])

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for name in history[0]:
    style = "-" if name == "loss" else "--"
    axes.plot([terms[name] for terms in history], style, label=name)
axes.set(xlabel="step", ylabel="weighted term", yscale="log")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, ncols=2, fontsize=9)

"""Transfer: a frozen backbone's features of other images, and a linear classifier on them.

VOC07 classification is the paper's: on each image the classes of its objects, by one linear SVM a class
(trained on trainval, its cost chosen there by three-fold cross-validation) or one linear layer; the
mean average precision on test. An image whose objects of a class are all marked as difficult counts
neither for nor against it, as in the challenge.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import torch
import torchvision
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.stl10.evaluate import features_of
from benchmarks.stl10.settings import Settings

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
COSTS = (0.01, 0.1, 1.0, 10.0)
Array = np.ndarray[Any, Any]


class VOC07(torchvision.datasets.VOCDetection):
    """torchvision's VOC 2007, with the classes of an image's objects as its label.

    Args:
        root: The folder of ``VOCdevkit``.
        image_set: ``"trainval"`` or ``"test"``.
        download: Whether it is downloaded if it is not there.

    Attributes:
        classes_of: Shape (N, 20): 1 with an object of the class, 0 without, -1 with difficult ones only.
    """

    def __init__(self, root: str | Path, image_set: str, download: bool = False) -> None:
        try:
            super().__init__(root, year="2007", image_set=image_set, download=download)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"VOC 2007 must be in {Path(root) / 'VOCdevkit' / 'VOC2007'} but its {image_set} is "
                f"not: {error} Run with --download true, or name the folder above it with --data_dir."
            ) from error
        self.classes_of = np.zeros((len(self.images), len(CLASSES)), dtype=np.int64)
        for row, path in zip(self.classes_of, self.annotations, strict=True):
            for node in ElementTree.parse(path).iter("object"):
                place = CLASSES.index(str(node.findtext("name")))
                difficult = node.findtext("difficult") == "1"
                row[place] = max(row[place], 1) if not difficult else row[place] or -1

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns an image and its place, by which its classes are found."""
        return super().__getitem__(index)[0], index


def voc07(
    backbone: nn.Module, settings: Settings, classifier: Literal["svm", "linear"] = "svm"
) -> dict[str, Any]:
    """Evaluates a frozen backbone on VOC07 classification.

    Args:
        backbone: From images to features of shape (N, D), on the device to compute on.
        settings: ``data_dir``, ``download``, ``image_size``, ``normalization`` and the linear
            classifier's settings are read.
        classifier: One linear SVM a class, or one linear layer with a logistic loss a class.

    Returns:
        ``map``: the mean average precision in percent, ``ap`` of each class, and ``images``.
    """
    parts = {}
    for image_set in ("trainval", "test"):
        images = VOC07(settings.data_dir, image_set, settings.download)
        features, _ = features_of(backbone, images, settings, f"features of {image_set}")
        parts[image_set] = normalize(features.numpy()), images.classes_of
    fit = {"svm": svm_scores, "linear": linear_scores}[classifier]
    scores = fit(*parts["trainval"], parts["test"][0], settings)
    ap = average_precisions(scores, parts["test"][1])
    return {
        "map": float(np.mean(list(ap.values()))),
        "ap": ap,
        "images": {name: len(part[1]) for name, part in parts.items()},
    }


def average_precisions(scores: Array, targets: Array) -> dict[str, float]:
    """Returns the average precision of each class in percent; classes without an image are left out.

    Args:
        scores: Shape (N, 20).
        targets: Shape (N, 20): 1, 0, or -1 for what does not count.

    Examples:
        >>> targets = np.zeros((3, 20), dtype=int)
        >>> targets[:, 0] = [1, -1, 0]
        >>> average_precisions(np.eye(3, 20), targets)
        {'aeroplane': 100.0}
    """
    found = {}
    for i, name in enumerate(CLASSES):
        counted = targets[:, i] >= 0
        if (targets[:, i] == 1).any():
            value = average_precision_score(targets[counted, i], scores[counted, i])
            found[name] = 100 * float(value)
    return found


def svm_scores(features: Array, targets: Array, test: Array, settings: Settings) -> Array:
    """Trains a linear SVM a class and returns its decision on the test features, shape (M, 20)."""
    scores = np.zeros((len(test), len(CLASSES)))
    for i in range(len(CLASSES)):
        counted = targets[:, i] >= 0
        x, y = features[counted], targets[counted, i]
        if len(set(y)) < 2:
            continue
        svm = LinearSVC(class_weight={0: 1, 1: 2}, random_state=settings.seed, max_iter=2000)
        folds = min(3, int(min(y.sum(), (1 - y).sum())))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Liblinear failed to converge")
            if folds >= 2:
                search = GridSearchCV(svm, {"C": COSTS}, scoring="average_precision", cv=folds)
                scores[:, i] = search.fit(x, y).decision_function(test)
            else:
                scores[:, i] = svm.fit(x, y).decision_function(test)
    return scores


def linear_scores(features: Array, targets: Array, test: Array, settings: Settings) -> Array:
    """Trains one linear layer with a logistic loss a class; returns logits of shape (M, 20)."""
    torch.manual_seed(settings.seed)
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    layer = nn.Linear(x.shape[1], len(CLASSES))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    batch_size = min(256, len(x))
    steps = settings.probe_epochs * -(-len(x) // batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.probe_epochs):
        for index in torch.randperm(len(x)).split(batch_size):
            loss: Tensor = F.binary_cross_entropy_with_logits(
                layer(x[index]), y[index].clamp(min=0).float(), weight=(y[index] >= 0).float()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        scores: Array = layer(torch.from_numpy(test)).numpy()
    return scores

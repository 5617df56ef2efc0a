"""The data sets, all torchvision's: STL10, CIFAR-10, folders of images, and embedded photographs."""

from __future__ import annotations

import tarfile
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision
from lightly.data import LightlyDataset
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2 as T

from benchmarks.common.data import ImageFolder
from benchmarks.common.photographs import Photographs
from benchmarks.stl10.settings import NORMALIZATIONS, Settings
from mvmr_loss.adapters.lightly import MVMRTransform, NonAugmentedViewTransform


class Data(NamedTuple):
    """What a run reads: data sets of (PIL image, label), of which -1 is none.

    Attributes:
        pretrain: Images for pretraining.
        train: Labelled images for the evaluations.
        test: Labelled images that accuracies are computed on.
        classes: Names of the classes.
        labels: Those of ``train``, int64 of shape (N,).
        folds: STL10's folds of ``train``, index arrays; empty for other data.
    """

    pretrain: Dataset[Any]
    train: Dataset[Any]
    test: Dataset[Any]
    classes: list[str]
    labels: np.ndarray[Any, Any]
    folds: list[np.ndarray[Any, Any]]


class Transformed(Dataset[Any]):
    """A data set of (PIL image, label) with a transform."""

    def __init__(self, dataset: Dataset[Any], transform: Callable[[Any], Any]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns a transformed image and its label."""
        image, label = self.dataset[index]
        return self.transform(image), int(label)


def normalize(settings: Settings) -> dict[str, list[float]]:
    """Returns the mean and standard deviation as lightly's transforms take them."""
    chosen = NORMALIZATIONS[settings.normalization]
    return {"mean": list(chosen.mean), "std": list(chosen.std)}


def views(settings: Settings) -> MVMRTransform:
    """Returns the transform of pretraining: the non-augmented view, then one for mvmr, else two."""
    jitter = dict(
        zip(("cj_bright", "cj_contrast", "cj_sat", "cj_hue"), settings.color_jitter, strict=True)
    )
    return MVMRTransform(
        settings.image_size,
        num_augmented_views=1 if settings.method == "mvmr" else 2,
        normalize=normalize(settings),
        min_scale=settings.crop_scale_min,
        cj_prob=settings.color_jitter_probability,
        random_gray_scale=settings.grayscale_probability,
        gaussian_blur=1.0 if settings.blur else 0.0,
        **jitter,
    )


def plain(settings: Settings) -> NonAugmentedViewTransform:
    """Returns the transform of images as they are."""
    return NonAugmentedViewTransform(settings.image_size, normalize=normalize(settings))


def finetuning(settings: Settings) -> T.Compose:
    """Returns lightly's transform for fine-tuning: random crops and flips."""
    return T.Compose(
        [
            T.RandomResizedCrop(settings.image_size),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(**normalize(settings)),
        ]
    )


def load_data(settings: Settings) -> Data:
    """Reads the data set that the settings name.

    Args:
        settings: ``data``, ``data_dir``, ``download`` and ``labels`` are read.

    Returns:
        The data.

    Raises:
        FileNotFoundError: If data are missing; the message tells how to get them.
        ValueError: If a file is damaged, or the splits do not fit together.

    Examples:
        >>> data = load_data(Settings(data="photographs"))
        >>> len(data.train), len(data.test), data.classes[:2]
        (2970, 770, ['astronaut', 'brick'])
    """
    root = Path(settings.data_dir).expanduser()
    pretrain: Dataset[Any] | None = None
    folds: list[np.ndarray[Any, Any]] = []
    if settings.data == "stl10":
        train, test, pretrain = (
            _open(torchvision.datasets.STL10, root, settings.download, split=split)
            for split in ("train", "test", "train+unlabeled")
        )
        folds = _folds(root, len(train), needed="folds" in settings.labels)
        train.targets = train.labels
    elif settings.data == "cifar10":
        train, test = (
            _open(torchvision.datasets.CIFAR10, root, settings.download, train=split)
            for split in (True, False)
        )
    elif settings.data == "photographs":
        train, test = Photographs("train"), Photographs("test")
    else:
        folder = Path(settings.data).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                "data must be stl10, cifar10, photographs or a folder with train/ and test/ inside, "
                f"but is {settings.data!r}, which is none of them."
            )
        train, test = (
            ImageFolder(folder / split, image_size=settings.image_size)
            for split in ("train", "test")
        )
        if (folder / "unlabeled").is_dir():
            # What its folders are called means nothing.
            unlabeled = ImageFolder(folder / "unlabeled", image_size=settings.image_size)
            unlabeled.target_transform = _unknown
            pretrain = ConcatDataset([train, unlabeled])
    if settings.data != "stl10" and train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"train and test must have the same classes but {', '.join(differing)} are in one only."
        )
    labels = np.asarray(train.targets, dtype=np.int64)
    classes = list(getattr(test, "classes", None) or map(str, range(1, 11)))
    return Data(train if pretrain is None else pretrain, train, test, classes, labels, folds)


def _unknown(_: int) -> int:
    """Returns the label that is none; a function with a name, as worker processes are sent it."""
    return -1


def pretraining_set(data: Data, settings: Settings) -> Any:
    """Returns lightly's data set of pretraining, which gives (views, label, file name)."""
    transform = views(settings)
    # lightly gives its transform to the data set, which other parts of a run read as it is.
    return LightlyDataset.from_torch_dataset(Transformed(data.pretrain, transform), transform)


def subset(data: Data, index: Any) -> Dataset[Any]:
    """Returns some of the labelled training images."""
    return Subset(data.train, np.asarray(index).tolist())


def _folds(root: Path, size: int, needed: bool) -> list[np.ndarray[Any, Any]]:
    """Reads STL10's folds, which torchvision gives one by one only."""
    path = root / torchvision.datasets.STL10.base_folder / "fold_indices.txt"
    if not path.is_file():
        if needed:
            raise FileNotFoundError(
                f"{path} must list STL10's folds but is missing; run with --download true, or leave "
                "'folds' out of labels."
            )
        return []
    folds = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fold = np.array([int(i) if i.isdecimal() else -1 for i in line.split()])
        if len(fold) == 0 or fold.min() < 0 or fold.max() >= size:
            raise ValueError(
                f"line {number} of {path} must hold indices of the {size} training images but does "
                "not; delete the file and run with --download true."
            )
        folds.append(fold)
    return folds


def _open(cls: Any, root: Path, download: bool, **options: Any) -> Any:
    """Creates one of torchvision's data sets; an error names the file and the remedy."""
    try:
        return cls(root, download=download, **options)
    except (RuntimeError, OSError, ValueError, EOFError, tarfile.TarError) as error:
        name, folder = cls.__name__, root / cls.base_folder
        if isinstance(error, urllib.error.URLError):
            raise FileNotFoundError(
                f"{name} could not be downloaded ({error.reason}); check the network, or put its "
                f"files into {folder}."
            ) from error
        files = [(folder / file, md5) for file, md5 in [*cls.train_list, *cls.test_list]]
        missing = [path.name for path, _ in files if not path.is_file()]
        packed = root / cls.filename
        again = "run with --download true to get it again"
        if missing and packed.is_file() and not check_integrity(str(packed), cls.tgz_md5):
            raise ValueError(
                f"{packed} is damaged or only a part: its {packed.stat().st_size} bytes have another "
                f"checksum than {name}'s; {again}."
            ) from error
        if missing:
            raise FileNotFoundError(
                f"{name} must be in {folder} but {', '.join(missing)} are missing; run with "
                "--download true, or name the folder above it with --data_dir."
            ) from error
        for path, md5 in files:
            if not check_integrity(str(path), md5):
                raise ValueError(
                    f"{path} is damaged: its {path.stat().st_size} bytes have another checksum than "
                    f"{name}'s. Delete it and {again}."
                ) from error
        raise ValueError(f"{name} in {folder} cannot be read: {error}") from error

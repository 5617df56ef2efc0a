"""The data sets, as batches of uint8 images; augmentation happens on the device, batch by batch."""

from __future__ import annotations

import tarfile
import urllib.error
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional as TF

from benchmarks.common.data import ImageFolder, image_tensor
from benchmarks.common.photographs import Photographs
from benchmarks.stl10.settings import MEAN_STD, Settings

# Folders of images are read once and kept in memory up to this size.
MEMORY_LIMIT = 4 * 2**30


class Images(Protocol):
    """Labelled images that are read in batches."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def __getitems__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images, uint8 of shape (N, 3, H, W), and labels, int64 of shape (N,)."""


class ArrayImages(Dataset[Any]):
    """Images in memory.

    Args:
        images: uint8 of shape (N, 3, H, W); memory of any strides.
        labels: Integers of shape (N,); -1 for an image without a label.
    """

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def __getitems__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images, uint8 of shape (N, 3, H, W), and labels, int64 of shape (N,)."""
        images = np.ascontiguousarray(self.images[index])
        return torch.from_numpy(images), torch.from_numpy(self.labels[index].astype(np.int64))


class FolderImages(Dataset[Any]):
    """Images that are decoded each time they are read, for folders too large for memory."""

    def __init__(self, folder: ImageFolder, image_size: int) -> None:
        self.folder, self.image_size = folder, image_size

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.folder)

    def __getitems__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images, uint8 of shape (N, 3, H, W), and labels, int64 of shape (N,)."""
        part = torch.utils.data.Subset(self.folder, list(index))
        return image_tensor(part, self.image_size)


class Part(Dataset[Any]):
    """Some of the images.

    Args:
        images: All of them.
        index: Which ones.
    """

    def __init__(self, images: Images, index: Sequence[int]) -> None:
        self.images, self.index = images, list(index)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.index)

    def __getitems__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images, uint8 of shape (N, 3, H, W), and labels, int64 of shape (N,)."""
        return self.images.__getitems__([self.index[i] for i in index])


class Indexed(Dataset[Any]):
    """Images that are read together with their indices, by which features of theirs are kept.

    Args:
        images: The images.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def __getitems__(self, index: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images, labels, and indices, int64 of shape (N,)."""
        return (*self.images.__getitems__(index), torch.tensor(index))


class Data(NamedTuple):
    """What a run reads.

    Attributes:
        pretrain: Images for pretraining; labels are not looked at.
        train: Labelled images for the evaluations.
        test: Labelled images that accuracies are computed on.
        classes: Names of the classes.
        train_labels: Labels of ``train``.
        folds: STL10's folds of ``train``, index arrays; empty for other data.
    """

    pretrain: Images
    train: Images
    test: Images
    classes: list[str]
    train_labels: np.ndarray[Any, Any]
    folds: list[np.ndarray[Any, Any]]


def load_data(settings: Settings) -> Data:
    """Reads the data set that the settings name.

    Args:
        settings: ``data``, ``data_dir``, ``download`` and ``image_size`` are read.

    Returns:
        The data.

    Raises:
        FileNotFoundError: If data are missing; the message tells how to get them.
        ValueError: If a file is damaged, or the splits do not fit together.

    Examples:
        >>> data = load_data(Settings(data="photographs", image_size=16))
        >>> len(data.train), len(data.test), data.classes[:2]
        (2970, 770, ['astronaut', 'brick'])
    """
    if settings.data == "stl10":
        return _stl10(settings)
    if settings.data == "cifar10":
        train, test = (_cifar10(settings, train=split) for split in (True, False))
        return _data(train, test, None, settings)
    if settings.data == "photographs":
        return _data(Photographs("train"), Photographs("test"), None, settings)
    root = Path(settings.data).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"data must be stl10, cifar10, photographs or a folder with train/ and test/ inside, "
            f"but is {settings.data!r}, which is none of them."
        )
    unlabeled = ImageFolder(root / "unlabeled") if (root / "unlabeled").is_dir() else None
    return _data(ImageFolder(root / "train"), ImageFolder(root / "test"), unlabeled, settings)


def _data(train: Any, test: Any, unlabeled: Any, settings: Settings) -> Data:
    """Returns the data of labelled data sets of PIL images, and one without labels."""
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"train and test must have the same classes but {', '.join(differing)} are in one only."
        )
    labelled = _images(train, settings.image_size, "reading train")
    pretrain: Images = labelled
    if unlabeled is not None:
        pretrain = _Joined(labelled, _images(unlabeled, settings.image_size, "reading unlabeled"))
    return Data(
        pretrain=pretrain,
        train=labelled,
        test=_images(test, settings.image_size, "reading test"),
        classes=list(train.classes),
        train_labels=np.asarray(train.targets, dtype=np.int64),
        folds=[],
    )


class _Joined(Dataset[Any]):
    """Two data sets, one after the other; the second has no labels."""

    def __init__(self, first: Images, second: Images) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitems__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        at = np.asarray(index)
        inside = at < len(self.first)
        labels = torch.full((len(at),), -1)
        parts = []
        if inside.any():
            images, labels[torch.from_numpy(inside)] = self.first.__getitems__(at[inside].tolist())
            parts.append(images)
        if not inside.all():
            parts.append(self.second.__getitems__((at[~inside] - len(self.first)).tolist())[0])
        read = torch.cat(parts)
        # Those of the first data set have been read first: back into the order of the index.
        images = torch.empty_like(read)
        images[torch.from_numpy(np.argsort(~inside, kind="stable"))] = read
        return images, labels


def _images(dataset: Any, image_size: int, description: str) -> Images:
    """Returns a data set of PIL images in memory if it fits there."""
    if isinstance(dataset, ImageFolder) and len(dataset) * 3 * image_size**2 > MEMORY_LIMIT:
        return FolderImages(dataset, image_size)
    images, labels = image_tensor(dataset, image_size, description)
    return ArrayImages(images.numpy(), labels.numpy())


def _cifar10(settings: Settings, train: bool) -> Any:
    """Returns torchvision's CIFAR-10."""
    cls = torchvision.datasets.CIFAR10
    names = [*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]]
    return _open(
        "cifar10",
        lambda: cls(settings.data_dir, train=train, download=settings.download),
        [(Path(settings.data_dir) / cls.base_folder / name, md5) for name, md5 in names],
        (Path(settings.data_dir) / cls.filename, cls.tgz_md5),
    )


def _stl10(settings: Settings) -> Data:
    """Returns torchvision's STL10: train+unlabeled for pretraining, its folds, train and test."""
    cls = torchvision.datasets.STL10
    folder = Path(settings.data_dir) / cls.base_folder
    files = [(folder / name, md5) for name, md5 in [*cls.train_list, *cls.test_list]]
    archive = (Path(settings.data_dir) / cls.filename, cls.tgz_md5)

    def split(name: str) -> Any:
        return _open(
            "stl10",
            lambda: cls(settings.data_dir, split=name, download=settings.download),
            files,
            archive,
        )

    everything, test = split("train+unlabeled"), split("test")
    # The labelled images come first and are the only ones with labels.
    labelled = int((everything.labels >= 0).sum())
    folds_file = folder / cls.folds_list_file
    if "folds" in settings.labels and not folds_file.is_file():
        raise FileNotFoundError(
            f"{folds_file} must list STL10's folds but is missing; run with --download, or leave "
            "'folds' out of labels."
        )
    folds = []
    if folds_file.is_file():
        for number, line in enumerate(folds_file.read_text().splitlines()):
            fold = np.array([int(i) if i.isdecimal() else -1 for i in line.split()])
            if len(fold) == 0 or fold.min() < 0 or fold.max() >= labelled:
                raise ValueError(
                    f"line {number + 1} of {folds_file} must hold indices of the {labelled} "
                    "training images but does not; delete the file and run with --download."
                )
            folds.append(fold)
    return Data(
        pretrain=_resized(ArrayImages(everything.data, everything.labels), settings.image_size),
        train=_resized(
            ArrayImages(everything.data[:labelled], everything.labels[:labelled]),
            settings.image_size,
        ),
        test=_resized(ArrayImages(test.data, test.labels), settings.image_size),
        classes=list(getattr(test, "classes", None) or map(str, range(1, 11))),
        train_labels=everything.labels[:labelled].astype(np.int64),
        folds=folds,
    )


class _Resized(Dataset[Any]):
    """Images resized as they are read."""

    def __init__(self, images: Images, image_size: int) -> None:
        self.images, self.image_size = images, image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.images.__getitems__(index)
        return TF.resize(images, [self.image_size, self.image_size]), labels


def _resized(images: ArrayImages, image_size: int) -> Images:
    """Returns square images at another size, or as they are."""
    return images if images.images.shape[-1] == image_size else _Resized(images, image_size)


def _open(
    name: str, create: Any, files: Sequence[tuple[Path, str]], archive: tuple[Path, str]
) -> Any:
    """Creates one of torchvision's data sets; an error names the file and the remedy."""
    try:
        return create()
    except (RuntimeError, OSError, ValueError, EOFError, tarfile.TarError) as error:
        if isinstance(error, urllib.error.URLError):
            raise FileNotFoundError(
                f"{name} could not be downloaded ({error.reason}); check the network, or put its "
                f"files into {files[0][0].parent}."
            ) from error
        missing = [path for path, _ in files if not path.is_file()]
        packed, packed_md5 = archive
        if missing and packed.is_file() and not check_integrity(str(packed), packed_md5):
            raise ValueError(
                f"{packed} is damaged or only a part: its {packed.stat().st_size} bytes have "
                f"another checksum than {name}'s; run with --download to get it again."
            ) from error
        if len(missing) == len(files):
            raise FileNotFoundError(
                f"{name} must be in {files[0][0].parent} but is not there; run with --download, or "
                "name the folder above it with --data-dir."
            ) from error
        if missing:
            raise FileNotFoundError(
                f"{name} is incomplete: {', '.join(path.name for path in missing)} missing in "
                f"{files[0][0].parent}; the download or the unpacking was interrupted. Run with "
                "--download to get it again."
            ) from error
        for path, md5 in files:
            if not check_integrity(str(path), md5):
                raise ValueError(
                    f"{path} is damaged: its {path.stat().st_size} bytes have another checksum "
                    f"than {name}'s. Delete it and run with --download to get it again."
                ) from error
        raise ValueError(f"{name} in {files[0][0].parent} cannot be read: {error}") from error


class EpochSampler(Sampler[list[int]]):
    """Batches of indices in an order that depends on the seed and the epoch alone.

    So a resumed run reads what the uninterrupted one would have read. An incomplete last batch is
    left out. Each process reads its own share of each batch.

    Args:
        length: Number of images.
        batch_size: Images a step, of all processes together.
        seed: Draws the order.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer images than one batch.

    Examples:
        >>> sampler = EpochSampler(10, 4, seed=0)
        >>> len(sampler), [len(batch) for batch in sampler]
        (2, [4, 4])
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if length < batch_size:
            raise ValueError(
                f"batch_size must be at most the number of images, {length}, but is {batch_size}."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.share = slice(rank, None, world_size)
        self.epoch = 0

    @property
    def sampler(self) -> EpochSampler:
        """Itself: Lightning sets the epoch of a batch sampler's ``sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration belongs to; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns the number of steps of an epoch."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the indices of each batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        for i in range(len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size][self.share].tolist()


def train_loader(
    images: Images | Indexed, sampler: EpochSampler, num_workers: int
) -> DataLoader[Any]:
    """Returns the loader of training batches.

    Args:
        images: The images, with their indices or without.
        sampler: Draws the batches.
        num_workers: Processes that read images.

    Returns:
        A loader of what ``images`` gives: (images, labels), or (images, labels, indices).
    """
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_read,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def in_order(images: Images, num_workers: int, batch_size: int = 256) -> DataLoader[Any]:
    """Returns a loader of all images in their order.

    Args:
        images: The images.
        num_workers: Processes that read images.
        batch_size: Images a batch.

    Returns:
        A loader of (images, labels).
    """
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_as_read,
    )


def _as_read(batch: Any) -> Any:
    """Returns a batch, which has been read as a whole."""
    return batch


class Normalize(torch.nn.Module):
    """Turns uint8 images into normalised float32 ones: the non-augmented view.

    Args:
        name: "imagenet" or "cifar".

    Examples:
        >>> images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        >>> Normalize("imagenet")(images)[0, :, 0, 0]
        tensor([-2.1179, -2.0357, -1.8044])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        for key, values in zip(("mean", "std"), MEAN_STD[name], strict=True):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns float32 images of shape (N, 3, H, W)."""
        return (images.float() / 255 - self.mean) / self.std

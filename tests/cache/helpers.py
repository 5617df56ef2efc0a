"""What the tests of the store share."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mvmr_loss import Representations, register_representation
from mvmr_loss.cache import RepresentationCache
from mvmr_loss.representations import Representation

ROOT = Path(__file__).parents[2]
NAMES = ["pixels", "local_std"]


@register_representation("counting")
class Counting(Representation):
    """Pixels, counting the images it is computed for."""

    count = 0

    def extract(self, images):
        Counting.count += len(images)
        return images

    def output_shape(self, channels, height, width):
        return (channels, height, width)


def features(indices, width=5):
    """Rows that are a function of their index."""
    return {"a": torch.stack([torch.arange(width) + 10.0 * i for i in indices])}


def cached(path, names=NAMES, **options):
    cache = {"path": path, "num_samples": 20}
    own = {name: options.pop(name) for name in ("normalization", "sketch_dim") if name in options}
    return Representations(names, cache={**cache, **options}, **own)


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def damaged_store(tmp_path):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    store.write(range(6), features(range(6)))
    return tmp_path


def as_nobody(function):
    """Runs a function in a child process without root's rights, and returns what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork.
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            function()
            message = "nothing was raised"
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        message = file.read()
    os.waitpid(child, 0)
    return message


class PlainDataset(torch.utils.data.Dataset):
    """A user's own: no attributes that say what is in it."""

    def __init__(self, images):
        self.pictures = images

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index]

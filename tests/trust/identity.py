"""Stores opened for other images or settings than they were filled with: refused, every time."""

# ruff: noqa: B023 (the functions are called where they are made)
from __future__ import annotations

import json
import shutil
from collections import Counter

import torch
from torch.utils.data import TensorDataset

from mvmr_loss import Representations
from mvmr_loss.cache import dataset_fingerprint
from mvmr_loss.cache.metadata import json_checksum

COUNT, SIDE = 12, 8


def images(seed):
    return torch.randn(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def opened(folder, x, *, window_size=3, std=0.25, dtype="float16", told=None):
    """Representations with a store; ``told``: what is said to be the data set's fingerprint."""
    return Representations(
        ["pixels", {"name": "local_std", "window_size": window_size}],
        normalization=([0.5] * 3, [std] * 3),
        cache={
            "path": folder,
            "dataset": TensorDataset(x),
            "fingerprint": told,
            "image_shape": (3, SIDE, SIDE),
            "dtype": dtype,
            "checks_per_epoch": 10**6,  # Each batch is looked at; how often, is tested elsewhere.
        },
    )


def retyped(folder):
    """Another type of the same size, with a checksum that fits."""
    content = json.loads((folder / "metadata.json").read_text())
    del content["checksum"]
    content["dtype"] = "bfloat16"
    content["checksum"] = json_checksum(content)
    (folder / "metadata.json").write_text(json.dumps(content))


def identity(folder, draw, count):
    """Another data set, other images, order, views, settings or types."""
    counts, faults = Counter(), []
    for number in range(count):
        x = images(number)
        told = dataset_fingerprint(TensorDataset(x))
        opened(folder, x)(x, range(COUNT))
        one_changed = x.clone()
        place = draw.randrange(COUNT)
        one_changed[place] = images(number + 1)[place]
        changes = {
            "nothing": lambda: opened(folder, x)(x, range(COUNT)),
            "data set": lambda: opened(folder, images(number + 1)),
            "one image": lambda: [
                opened(folder, one_changed, told=told)(one_changed[i : i + 1], [i])
                for i in range(COUNT)
            ],
            "order": lambda: opened(folder, x, told=told)(x.roll(1, 0), range(COUNT)),
            "views": lambda: opened(folder, x)(x + 0.3 * torch.randn_like(x), range(COUNT)),
            "length": lambda: opened(folder, x[1:]),
            "normalisation": lambda: opened(folder, x, std=0.3),
            "normalised images": lambda: opened(folder, x)(1.2 * x - 0.1, range(COUNT)),
            "options": lambda: opened(folder, x, window_size=5),
            "type": lambda: opened(folder, x, dtype="float32"),
            "tampered type": lambda: (retyped(folder), opened(folder, x, dtype="bfloat16")),
        }
        what = list(changes)[number % len(changes)]
        try:
            changes[what]()
            if what != "nothing":
                faults.append(f"identity {number}: {what}: not found out")
        except ValueError as error:
            if what == "nothing":
                faults.append(f"identity {number}: refused, though the same: {error}")
        counts[what] += 1
        shutil.rmtree(folder)
    return counts, faults

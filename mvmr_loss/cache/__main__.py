"""The command that fills, checks and describes stores of representations."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mvmr_loss.cache.dataset import fill
from mvmr_loss.cache.files import CorruptCacheError
from mvmr_loss.cache.folder import image_folder
from mvmr_loss.cache.store import DTYPES, RepresentationCache
from mvmr_loss.representations.collection import Representations


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mvmr_loss.cache",
        description="Fills, checks and describes stores of representations.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "fill",
        help="compute what is missing; the same command goes on where it stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("store", type=Path, help="folder of the store")
    data = (
        "folder with a folder of images a class, or a class of torchvision.datasets such as CIFAR10"
    )
    add("--data", required=True, help=data)
    add("--root", default="data", help="where torchvision finds the data set named by --data")
    add("--split", default="train", help="of the data set named by --data, as torchvision calls it")
    add(
        "--representations",
        nargs="+",
        metavar="NAME",
        default=["pixels", "scattering", "hog", "local_std"],
        help='names, or JSON with options: \'{"name": "hog", "orientations": 9}\'',
    )
    add("--sketch-dim", type=int, default=1024, help="width of the sketches; 0: exact")
    add("--sketch-seed", type=int, default=0, help="seed of the sketches")
    size = "side of the images: the shorter side is resized to it, and the centre cropped"
    add("--image-size", type=int, required=True, help=size)
    resized = "what the shorter side is resized to, before the crop; None: --image-size"
    add("--resize-size", type=int, help=resized)
    how = "of the resizing, as the training's"
    add("--interpolation", choices=["bilinear", "bicubic", "nearest"], default="bilinear", help=how)
    add("--mean", type=float, nargs="+", default=[0.485, 0.456, 0.406], help="of each channel")
    add("--std", type=float, nargs="+", default=[0.229, 0.224, 0.225], help="of each channel")
    add("--dtype", choices=list(DTYPES), default="float16", help="type of the stored numbers")
    add("--batch-size", type=int, default=64, help="images a batch")
    add("--processes", type=int, default=1, help="processes that compute")
    add("--workers", type=int, default=0, help="worker processes of each that load images")
    add("--skip-broken", action="store_true", help="name images that cannot be read and go on")
    add("--device", default="cpu", help="where to compute")
    command = commands.add_parser("verify", help="compare every row with its checksum")
    command.add_argument("store", type=Path, help="folder of the store")
    command.add_argument("--repair", action="store_true", help="mark damaged rows as missing")
    command = commands.add_parser("info", help="tell what is in a store")
    command.add_argument("store", type=Path, help="folder of the store")
    settings = parser.parse_args(arguments)
    if settings.command == "fill":
        for name in ("image_size", "batch_size", "processes"):
            if getattr(settings, name) < 1:
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} must be at least 1 but is {getattr(settings, name)}.")
        settings.data = os.path.expanduser(settings.data)
        if settings.resize_size is None:
            settings.resize_size = settings.image_size
        if settings.resize_size < settings.image_size:
            parser.error(
                f"--resize-size must be at least --image-size, {settings.image_size}, but is "
                f"{settings.resize_size}."
            )
    return settings


def _dataset(settings: argparse.Namespace) -> Any:
    """Returns the data set that the command line names, with the non-augmented view's transform."""
    try:
        from torchvision import datasets
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            "the fill command reads images with torchvision: pip install torchvision"
        ) from error
    transform = v2.Compose(
        [
            v2.Resize(settings.resize_size, v2.InterpolationMode(settings.interpolation)),
            v2.CenterCrop(settings.image_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            # Which would make three channels of a grey image and three means.
            functools.partial(_check_channels, settings.mean, settings.std),
            v2.Normalize(settings.mean, settings.std),
        ]
    )
    if Path(settings.data).is_dir():
        _check_split(settings, settings.split == "train", "left out for a folder")
        return image_folder(settings.data, transform, settings.resize_size)
    cls: Any = getattr(datasets, settings.data, None)
    if not isinstance(cls, type):
        raise ValueError(
            "--data must be a folder with one folder of images a class, or the name of a class in "
            f"torchvision.datasets, but is {settings.data!r}."
        )
    options: dict[str, Any] = {"transform": transform}
    known = inspect.signature(cls).parameters
    if "split" in known:
        options["split"] = settings.split
    elif "train" in known:
        _check_split(settings, settings.split in ("train", "test"), "train or test")
        options["train"] = settings.split == "train"
    else:
        _check_split(settings, settings.split == "train", f"left out for {settings.data}")
    try:
        return cls(settings.root, **options)
    except RuntimeError as error:
        raise ValueError(f"{settings.data} cannot be read in {settings.root}: {error}") from error


def _check_split(settings: argparse.Namespace, fits: bool, needed: str) -> None:
    """Raises where ``--split`` would be taken for another one, or for nothing."""
    if not fits:
        raise ValueError(f"--split must be {needed} but is {settings.split!r}.")


class _ChannelsError(ValueError):
    """Images are of other channels than the statistics, as all of them will be."""


def _check_channels(mean: Sequence[float], std: Sequence[float], image: Any) -> Any:
    """Returns an image of as many channels as there are statistics."""
    if not len(image) == len(mean) == len(std):
        raise _ChannelsError(
            f"--mean and --std must have a number for each of {len(image)} channels but have "
            f"{len(mean)} and {len(std)}."
        )
    return image


def _representations(settings: argparse.Namespace, dataset: Any) -> Representations:
    """Returns the representations that the command line names, with their cache."""
    try:
        names = [json.loads(r) if r.startswith("{") else r for r in settings.representations]
    except ValueError as error:
        raise ValueError(f"--representations must be names or JSON: {error}.") from error
    cache = {
        "path": settings.store,
        "dataset": dataset,
        "image_shape": (len(settings.mean), settings.image_size, settings.image_size),
        "dtype": settings.dtype,
    }
    return Representations(
        names,
        normalization=(settings.mean, settings.std),
        sketch_dim=settings.sketch_dim or None,
        sketch_seed=settings.sketch_seed,
        cache=cache,
    ).to(settings.device)


def _fill_share(settings: argparse.Namespace, rank: int) -> None:
    """Fills one process's share."""
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.processes))
    try:
        dataset = _dataset(settings)
        fill(
            _representations(settings, dataset),
            dataset,
            batch_size=settings.batch_size,
            num_workers=settings.workers,
            device=settings.device,
            share=(rank, settings.processes),
            on_broken=_tell if settings.skip_broken else None,
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(1) from None


def _tell(sentence: str) -> None:
    """Says what was skipped."""
    print(f"Skipped: {sentence}", file=sys.stderr, flush=True)


def _check_before_it_is_made(settings: argparse.Namespace, dataset: Any) -> None:
    """Raises where the store would be left behind, of no use or in the way."""
    data = Path(settings.data).resolve()
    if settings.store.expanduser().resolve().is_relative_to(data) and data.is_dir():
        raise ValueError(
            f"the store must lie outside of --data, whose folders are classes, but is {settings.store}."
        )
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device cannot be used, {settings.device!r}: {error}") from error
    try:
        dataset[0]
    except _ChannelsError:
        raise
    except Exception:  # An image that cannot be read is named, or skipped, when it is filled.
        return


def _fill_command(settings: argparse.Namespace) -> None:
    """Fills a store in several processes and shows how far they are."""
    dataset = _dataset(settings)
    _check_before_it_is_made(settings, dataset)
    _representations(settings, dataset)  # Makes the store, or refuses it.
    store = RepresentationCache(settings.store)
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_fill_share, args=(settings, rank))
        for rank in range(settings.processes)
    ]
    total, start = store.num_samples, time.monotonic()
    before = int(store.is_valid().sum())
    try:
        for process in processes:
            process.start()
        while alive := [process for process in processes if process.is_alive()]:
            alive[0].join(0.5)
            done = int(store.is_valid().sum())
            rate = (done - before) / (time.monotonic() - start)
            _show(done, total, f"{rate:.0f} images/s" if done > before else "starting")
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            if process.pid is not None:
                process.join()
    done = int(store.is_valid().sum())
    _show(done, total, "\n")
    if done < total and settings.skip_broken and not any(p.exitcode for p in processes):
        print(f"{total - done} of {total} rows are missing: skipped.", file=sys.stderr)
    elif done < total:
        raise OSError(
            f"{total - done} of {total} rows are still missing because a process stopped (see "
            "above); the same command goes on where it stopped."
        )


_shown = (-1, 0.0)  # How far, and when.


def _show(done: int, total: int, text: str) -> None:
    """Shows a progress bar, or in a file a line every half minute and at the end."""
    global _shown
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        print(f"\r{bar:-<30} {done}/{total} {text:<16}", end="", file=sys.stderr, flush=True)
    elif done != _shown[0] and (done == total or time.monotonic() > _shown[1] + 30):
        _shown = (done, time.monotonic())
        print(f"{done}/{total} {text}".rstrip(), file=sys.stderr, flush=True)


def _info(cache: RepresentationCache) -> str:
    """Returns what is in a store, as text."""
    valid = int(cache.is_valid().sum())
    size = cache.row_bytes * (cache.num_samples + 1)
    lines = [
        f"{cache.path}: {valid} of {cache.num_samples} rows, {size / 1e6:.1f} MB, "
        f"{cache.row_bytes} bytes a row, {str(cache.dtype).removeprefix('torch.')}, "
        f"made by {cache.made_by}",
        *(f"  {name}: {width} numbers" for name, width in cache.widths.items()),
        json.dumps(cache.settings, indent=2),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: As ``sys.argv[1:]``, which is the default.

    Raises:
        SystemExit: With one sentence, if something is wrong with the arguments, data or store.
    """
    settings = _parse(arguments)
    try:
        if settings.command == "fill":
            _fill_command(settings)
        elif settings.command == "info":
            print(_info(RepresentationCache(settings.store)))
        else:
            cache = RepresentationCache(settings.store)
            damaged = cache.verify(
                repair=settings.repair, progress=lambda done, total: _show(done, total, "")
            )
            print(file=sys.stderr)
            if damaged and not settings.repair:
                raise CorruptCacheError(
                    f"{len(damaged)} rows are damaged, the first of them {damaged[0]}; "
                    "--repair marks them as missing."
                )
            print(f"{int(cache.is_valid().sum())} of {cache.num_samples} rows are there and whole.")
            if damaged:
                print(f"{len(damaged)} damaged rows are now marked as missing; fill goes on there.")
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: the same command goes on where it stopped.") from None


if __name__ == "__main__":
    # A spawned process does not import a package's __main__ again, but finds functions by this name.
    from mvmr_loss.cache import __main__ as command

    command.main()

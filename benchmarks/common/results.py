"""Result files: what made them, and writing that an interruption cannot leave half done."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mvmr_loss import __version__


def environment(seed: int | None = None) -> dict[str, Any]:
    """Returns what a result depends on: machine, versions, seed and command.

    Args:
        seed: The run's seed, if it has one.

    Returns:
        A mapping that can be written as JSON; it holds no absolute path.
    """
    packages = ("torch", "kornia", "torchvision", "lightly", "lightning")
    versions = {
        "mvmr_loss": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages if importlib.util.find_spec(name)},
    }
    # The cores this process may use: a container's share, not the whole host's.
    affinity = getattr(os, "sched_getaffinity", None)
    machine = {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.system(),
    }
    return {"machine": machine, "versions": versions, "seed": seed, "command": command()}


def command() -> str:
    """Returns this process's command line with no absolute path in it, see :func:`portable`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        program = f"-m {spec.name.removesuffix('.__main__')}"
    else:
        program = str(portable(sys.argv[0]))
    return " ".join(["python", program, *(str(portable(argument)) for argument in sys.argv[1:])])


def portable(value: Any) -> Any:
    """Returns a setting as it may stand in a result file: with no absolute path.

    Args:
        value: A setting or an argument of a command line; a ``--option=PATH`` counts as its path.

    Returns:
        An absolute path inside the working directory as a relative one; any other absolute path as
        ``.../`` and its last two parts; everything else as it is, a relative path as a string.

    Examples:
        >>> portable("/somewhere/else/cifar10/train"), portable("--epochs=3"), portable(0.1)
        ('.../cifar10/train', '--epochs=3', 0.1)
    """
    if not isinstance(value, (str, Path)):
        return value
    option, equals, rest = "", "", str(value)
    if rest.startswith("--"):
        option, equals, rest = rest.partition("=")
    path = Path(rest).expanduser()
    if path.is_absolute():
        inside = path.is_relative_to(Path.cwd())
        rest = str(path.relative_to(Path.cwd())) if inside else "/".join(["...", *path.parts[-2:]])
    return f"{option}{equals}{rest}"


def _cpu_model() -> str:
    """Returns the processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which replaces it when the block ends without error.

    A reader sees the old file or the whole new one, whenever the process is stopped. The temporary
    path keeps the suffix, by which some writers choose their format.

    Args:
        path: The file to write; its folder is created.

    Yields:
        The path to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON atomically; NaN and infinity, which JSON does not know, are refused.

    Args:
        path: The file to write; its folder is created.
        content: What :mod:`json` can write.

    Raises:
        ValueError: If a number is not finite.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)

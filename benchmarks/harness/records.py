"""What a result file says: one schema for all benchmarks, its validator, and writing it whole."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mvmr_loss

REQUIRED_MACHINE = ("cpu", "cores", "threads", "gpus", "system")
REQUIRED_VERSIONS = ("mvmr_loss", "python", "torch", "kornia")
REQUIRED_CODE = ("commit", "changed", "package", "sources")
# An absolute path within a text: after what may stand before one in an argument, of which YAML's
# literals have the brackets and quotes. The two slashes of a URL begin none but after "file:".
ABSOLUTE = re.compile(
    r"""(?:(?<![^\s=,;|(){}\[\]<>"'`])|(?<=:)(?!//)|(?<=file://))"""  # before it
    r"""(?:~[\w.-]*/|[A-Za-z]:[\\/]|/)(?:(?![:=]/)[^\s,;|(){}\[\]<>"'`])+"""
)


def environment() -> dict[str, Any]:
    """Returns what made a result, beside its settings and seed; it holds no absolute path.

    Returns:
        ``machine``, ``versions``, ``code``, ``command`` and ``date``, as benchmarks/README.md says.
    """
    packages = ("torch", "kornia", "torchvision", "lightly", "lightning", "timm", "kymatio")
    versions = {
        "mvmr_loss": mvmr_loss.__version__,
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
    return {
        "machine": machine,
        "versions": versions,
        "code": code(),
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def device_of(record: Mapping[str, Any]) -> str:
    """Returns what computed a result: its GPUs, or where it has none its CPU."""
    machine = record["machine"]
    return ", ".join(machine["gpus"]) or str(machine["cpu"])


def code() -> dict[str, Any]:
    """Returns which code was measured: the benchmarks' commit, and where mvmr_loss came from.

    Returns:
        ``commit`` of the checkout that holds the benchmarks (None outside one), ``changed``: whether
        its tracked Python or C++ files differ from that commit, ``package``: ``"wheel"`` if mvmr_loss is
        installed, ``"checkout"`` if it is imported from its sources, and ``sources``: a hash of the
        package's files, the same for a checkout and a wheel built from it.
    """
    here = Path(__file__).resolve().parent
    package = Path(mvmr_loss.__file__).resolve().parent
    files = sorted(p for p in package.rglob("*") if p.suffix in (".py", ".cpp"))
    digest = hashlib.sha256()
    for file in files:
        # A wheel has the adapters inside the package, a checkout beside it: neither counts.
        if file.relative_to(package).parts[0] != "adapters":
            digest.update(file.relative_to(package).as_posix().encode() + b"\0")
            digest.update(file.read_bytes())
    # Results, which a running benchmark writes, are no change of the code.
    changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.cpp")
    return {
        "commit": _git(here, "rev-parse", "--short=10", "HEAD"),
        "changed": bool(changed),
        "package": "wheel" if any(package.parent.glob("mvmr_loss-*.dist-info")) else "checkout",
        "sources": digest.hexdigest()[:12],
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Returns what git says about the repository of a folder, or None outside one."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
        value: A setting or an argument of a command line. Of a mapping or a sequence, each value
            counts; of a text, each path that stands in it, as in ``--option=PATH`` or a literal.

    Returns:
        An absolute path inside the working directory as a relative one; any other absolute path as
        ``.../`` and its last two parts; a tuple as a list; everything else as it is, a relative path
        as a string.

    Examples:
        >>> portable("/somewhere/else/cifar10/train"), portable("--epochs=3"), portable(0.1)
        ('.../cifar10/train', '--epochs=3', 0.1)
        >>> portable("--representations=[{name: teacher, weights: /data/nets/vit/w.pt}]")
        '--representations=[{name: teacher, weights: .../vit/w.pt}]'
    """
    if isinstance(value, Mapping):
        return {str(key): portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    option, equals, rest = "", "", str(value)
    if rest.startswith("--"):
        option, equals, rest = rest.partition("=")
    # All of it first, for a path that has blanks in it; then what is left, or stands within a text.
    if Path(os.path.expanduser(rest)).is_absolute():
        rest = _shortened(rest)
    return option + equals + ABSOLUTE.sub(lambda found: _shortened(found[0]), rest)


def _shortened(path: str) -> str:
    """Returns an absolute path as a relative one, or as its last two parts."""
    # Not Path.expanduser, which raises at a "~" that is no user's.
    whole = Path(os.path.expanduser(path))
    if whole.is_relative_to(Path.cwd()):
        return str(whole.relative_to(Path.cwd()))
    return "/".join(["...", *Path(path).parts[1:][-2:]])


def _cpu_model() -> str:
    """Returns the processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _has(*keys: str) -> Callable[[Any], bool]:
    """Returns a test whether a value is a mapping with these keys."""
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


def _is_seed(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_day(value: Any) -> bool:
    try:
        return bool(datetime.date.fromisoformat(value).isoformat() == value)
    except (TypeError, ValueError):
        return False


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "the run's name"),
    "settings": (lambda value: isinstance(value, dict), "a mapping of what determines the result"),
    "seed": (_is_seed, "an integer, or null where nothing is drawn"),
    "figures": (lambda v: isinstance(v, dict) and bool(v), "a mapping with at least one figure"),
    "machine": (_has(*REQUIRED_MACHINE), f"a mapping with {', '.join(REQUIRED_MACHINE)}"),
    "versions": (_has(*REQUIRED_VERSIONS), f"a mapping with {', '.join(REQUIRED_VERSIONS)}"),
    "code": (_has(*REQUIRED_CODE), f"a mapping with {', '.join(REQUIRED_CODE)}"),
    "command": (_is_text, "the command line"),
    "date": (_is_day, "the day, YYYY-MM-DD"),
}
OPTIONAL = ("note",)


def validate(record: Any, source: str = "record") -> None:
    """Raises unless a record follows the schema of benchmarks/README.md.

    Args:
        record: What is to be checked.
        source: What an error calls it, such as the file's name.

    Raises:
        ValueError: If a field is missing, unknown or not what it must be, a number is not finite, or
            an absolute path is among the values.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{source} must hold a JSON object but holds {type(record).__name__}.")
    for field, (valid, needed) in FIELDS.items():
        if field not in record:
            raise ValueError(f"{source} must have the field {field!r} ({needed}) but has none.")
        if not valid(record[field]):
            raise ValueError(f"{source}: {field} must be {needed} but is {record[field]!r}.")
    for field in record:
        if field not in FIELDS and field not in OPTIONAL:
            raise ValueError(
                f"{source} has an unknown field {field!r}; put figures into 'figures'."
            )
    _check_values(record, source, "")


def _check_values(value: Any, source: str, place: str) -> None:
    """Raises at a value that JSON cannot hold, or that names a place of one machine."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_values(item, source, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_values(item, source, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{source}: {place} must be finite but is {value}.")
    elif isinstance(value, str) and ABSOLUTE.search(value):
        raise ValueError(f"{source}: {place} must hold no absolute path but is {value!r}.")
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        raise ValueError(f"{source}: {place} must be plain JSON but is {type(value).__name__}.")


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
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)

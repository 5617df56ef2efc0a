"""C++ kernels for CPUs: compiled when first used, done without where they can't be.

The C++ compiler of the machine is asked once for each source, compiler and processor; the library is
kept in a folder of the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``), or of the temporary files
where that is not to be had. The folder and what is loaded from it are the user's alone. The kernels
take addresses and numbers, nothing of torch: one library does for all its versions.

``MVMR_LOSS_NATIVE`` in the environment says what is wished: ``0`` forbids the kernels, ``1``, the
default, does without those that cannot be had, and ``required`` makes that an error.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mvmr_loss._cpu.folder import find_or_build

# With OpenMP the kernels share torch's own threads; others would wait for those to go to sleep.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
_SECONDS = 300  # that a compiler may take

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_MATRIX = (_POINTER, _SIZE, _SIZE, _SIZE)  # its values, both sizes, the stride of its rows
_POINTERS = ctypes.POINTER(_POINTER)
# The functions of each C++ file: what they return, then what they take.
_SIGNATURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "gram": {
        "centered_gram": (_INT, *_MATRIX, _POINTER, _POINTER, _INT),
        "product_about_mean": (_INT, _POINTER, *_MATRIX, _POINTER, _INT),
    },
    "scattering": {
        "scatterer_new": (_POINTER, ctypes.POINTER(_INT), *(_POINTERS,) * 4),
        "scatterer_delete": (None, _POINTER),
        "scatterer_run": (_INT, _POINTER, _POINTER, _POINTER, _SIZE, _INT),
    },
    "sketch": {
        "folded_sign_sketch": (
            *(_INT, *_MATRIX, _POINTER),
            *(ctypes.POINTER(_SIZE), _SIZE, _POINTER, _INT),
        ),
    },
}

_logger = logging.getLogger(__name__)


class KernelStatus(NamedTuple):
    """Whether a kernel for CPUs is used, as :func:`kernels` tells.

    Attributes:
        name: The kernel: ``gram``, ``scattering`` or ``sketch``.
        on: Whether it is used; plain torch computes the same otherwise.
        reason: Why it is not; empty where it is.
    """

    name: str
    on: bool
    reason: str


def kernels() -> list[KernelStatus]:
    """Tells which kernels for CPUs are used on this machine, and why the others are not.

    Those that nobody has compiled yet are compiled now, which takes some seconds. The same from a
    shell: ``python -m mvmr_loss``.

    Returns:
        A :class:`KernelStatus` for each kernel.

    Raises:
        ValueError: If ``MVMR_LOSS_NATIVE`` in the environment is not one of ``0``, ``1``, ``required``.

    Examples:
        >>> [status.name for status in kernels()]
        ['gram', 'scattering', 'sketch']
    """
    found = [(name, *_load(name)) for name in _SIGNATURES]
    return [KernelStatus(name, library is not None, reason) for name, library, reason in found]


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """Returns a compiled kernel.

    Args:
        name: The name of its C++ file, without the suffix.

    Returns:
        The library, or None if it is forbidden or cannot be had here; that it cannot is logged at
        WARNING, once, with the reason.

    Raises:
        RuntimeError: If it cannot be had and the environment requires it.
    """
    library, reason = _load(name)
    if library is None and _wish() != "0":
        if _wish() == "required":
            raise RuntimeError(
                f"MVMR_LOSS_NATIVE=required, but the kernel {name!r} cannot be used: {reason}"
            )
        _logger.warning(
            "mvmr_loss computes without its C++ kernel %r, more slowly: %s. MVMR_LOSS_NATIVE=0 in "
            "the environment forbids the kernels and this warning; docs/cost.md tells more.",
            name,
            reason,
        )
    return library


def _wish() -> str:
    wish = os.environ.get("MVMR_LOSS_NATIVE", "1")
    if wish not in ("0", "1", "required"):
        raise ValueError(
            f"MVMR_LOSS_NATIVE in the environment must be 0, 1 or required but is {wish!r}."
        )
    return wish


@functools.cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    """Returns a library, or None and why there is none."""
    if _wish() == "0":
        return None, "MVMR_LOSS_NATIVE=0 in the environment forbids it"
    if not hasattr(os, "geteuid"):
        return None, f"the kernels are for Linux and macOS, and this is {platform.system()}"
    try:
        source = Path(__file__).with_name(f"{name}.cpp")
        command = [*_compiler(), *_FLAGS]
        identity = (source.read_text(), *command, _version(command[0]), _processor())
        key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
        library = find_or_build(f"{name}_{key}_", lambda: _compile(command, source))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return None, str(error)
    try:
        for function, (result, *arguments) in _SIGNATURES[name].items():
            # Kept by getattr; by [] each look-up would make another one, without these types.
            declared = getattr(library, function)
            declared.restype, declared.argtypes = result, arguments
    except AttributeError as error:
        return (
            None,
            f"what {shlex.join(command)} made of {source.name} has not its functions: {error}",
        )
    return library, ""


def _compiler() -> list[str]:
    """Returns the command that ``CXX`` names, or the first compiler there is."""
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for program, *arguments in commands:
        if found := shutil.which(program):
            return [found, *arguments]
    names = " or ".join(command[0] for command in commands)
    raise OSError(f"there is no C++ compiler called {names}")


def _version(program: str) -> str:
    """Returns what changes when a compiler is replaced by another version."""
    found = os.stat(program)
    return f"{found.st_size} {found.st_mtime_ns}"


def _processor() -> str:
    """Returns what tells apart processors with different instructions, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = (line for line in lines if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {next(known, platform.processor())}"


def _compile(command: list[str], source: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="mvmr-loss-") as scratch:
        made = Path(scratch) / "kernel.so"
        try:
            done = subprocess.run(
                [*command, "-o", str(made), str(source)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except OSError as error:
            raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
        library = made.read_bytes() if done.returncode == 0 and made.is_file() else b""
        if not library:
            said = done.stderr.strip().splitlines() or [f"it returned {done.returncode}"]
            first = next((line for line in said if "error" in line.lower()), said[-1])
            raise RuntimeError(f"{command[0]} did not compile {source.name}: {first}")
        return library

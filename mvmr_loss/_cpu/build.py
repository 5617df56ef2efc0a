"""C++ kernels for CPUs: compiled when first used, done without where they can't be.

The C++ compiler of the machine is asked once for each source, compiler and processor; the library is
kept in a folder of the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``). ``MVMR_LOSS_NATIVE=0`` in the
environment forbids it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# With OpenMP the kernels share torch's own threads; others would wait for those to go to sleep.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)

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


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """Returns a compiled kernel.

    Args:
        name: The name of its C++ file, without the suffix.

    Returns:
        The library, or None if it is forbidden or cannot be compiled here; the log says why.
    """
    if os.environ.get("MVMR_LOSS_NATIVE", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _logger.info("mvmr_loss runs without the kernel %s: %s", name, error)
        return None
    for function, (result, *arguments) in _SIGNATURES[name].items():
        # Kept by getattr; by [] each look-up would make another one, without these types.
        declared = getattr(library, function)
        declared.restype, declared.argtypes = result, arguments
    return library


def _compiled(source: Path) -> Path:
    """Returns the library's path, after compiling it if it is not there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise OSError(f"there is no C++ compiler called {' or '.join(names)}")
    identity = (source.read_text(), compiler, *_FLAGS, platform.machine(), _processor())
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "mvmr-loss" / "native"
    library = folder / f"{source.stem}_{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may come here at once: each compiles, and the last one's file stays.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            command = [compiler, *_FLAGS, "-o", str(made), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(library)
    return library


def _processor() -> str:
    """Returns what tells apart processors with different instructions, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")

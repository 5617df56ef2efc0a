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

import torch
from torch import Tensor

# With OpenMP the kernels share torch's own threads; others would wait for those to go to sleep.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)

_logger = logging.getLogger(__name__)


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """Returns a compiled kernel.

    Args:
        source: The C++ file, ``NAME_cpu.cpp``.

    Returns:
        The library, or None if it is forbidden or cannot be compiled here; the log says why.
    """
    if os.environ.get("MVMR_LOSS_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _logger.info("mvmr_loss runs without %s: %s", source.name, error)
        return None


def can_read(x: Tensor) -> bool:
    """Tells whether a kernel can read a tensor: float32, as it lies in the CPU's memory."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and x.is_cpu
        and x.dtype == torch.float32
        and not x.is_neg()
    )


def can_compute(x: Tensor) -> bool:
    """Tells whether a kernel can stand in for torch: it can read ``x``, and no gradient is wanted."""
    return can_read(x) and not _wants_gradient(x)


def is_compiled_for_cpu(x: Tensor) -> bool:
    """Tells whether ``torch.compile`` is at work on a computation on a CPU.

    There, what runs in a kernel, or faster in eager mode, is a custom op, which the compiler leaves
    as it is.
    """
    return torch.compiler.is_compiling() and x.is_cpu


def can_be_op(x: Tensor) -> bool:
    """Tells whether a compiled computation can be such an op: no gradient of it is wanted."""
    return is_compiled_for_cpu(x) and not _wants_gradient(x)


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """Returns where the values of tensors begin, as arguments of a kernel."""
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def sizes(x: Tensor) -> list[ctypes.c_int64]:
    """Returns both sizes of a matrix and the stride of its rows, as arguments of a kernel."""
    return [ctypes.c_int64(size) for size in (*x.shape, x.stride(0))]


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


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
    library = folder / f"{source.stem.removesuffix('_cpu')}_{key}.so"
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

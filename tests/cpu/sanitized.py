"""Runs the kernels under the address and undefined-behaviour sanitizers of GCC, on drawn sizes.

    python tests/cpu/sanitized.py --cases 300 --seed 0

Each case is compared with the plain definition, too. The first fault ends the run, with an error.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from mvmr_loss._cpu import build, folder, gram, sketch
from mvmr_loss.representations import scattering
from mvmr_loss.representations.sketch import _fold

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def preloaded() -> str:
    """Returns what must be loaded before Python for its memory to be watched."""
    compiler = build._compiler()[0]
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, paths)):
        raise SystemExit(f"{compiler} has no address sanitizer that can be preloaded: GCC has.")
    return " ".join(paths)


def matrix(draw: random.Random, rows: int, columns: int) -> Tensor:
    """Draws a matrix whose last row ends where its memory ends, with or without a stride."""
    before = draw.choice([0, 0, 1, 7])
    return (torch.randn(rows, before + columns) + draw.choice([0.0, 3.0]))[:, before:]


def size(draw: random.Random, largest: int) -> int:
    return draw.choice([0, 1, 2, 3, 23, 24, 25, draw.randint(0, largest)])


def compare(actual: Tensor, expected: Tensor, scale: float) -> None:
    """Raises where float32 rounding does not explain the difference; the inputs are of order 1."""
    difference = float((actual - expected).abs().max()) if actual.numel() else 0.0
    if actual.shape != expected.shape or not difference <= 1e-5 * (1 + scale):
        raise AssertionError(f"off by {difference}: {actual.shape} of {expected.shape}")


def try_gram(draw: random.Random) -> str:
    x = matrix(draw, size(draw, 130), size(draw, 600))
    found = gram.centered_gram(x)
    centered = x.double() - x.double().mean(dim=0)
    if found is not None:
        compare(found, centered @ centered.T, 20.0 * x.shape[1])
    return f"gram {tuple(x.shape)}, {'left to torch' if found is None else 'computed'}"


def try_product(draw: random.Random) -> str:
    x = matrix(draw, size(draw, 130), size(draw, 600))
    weight = torch.randn(len(x), len(x))
    found = gram.product_about_mean(weight.T if draw.random() < 0.5 else weight, x)
    if found is None:
        raise AssertionError("the kernel was not used")
    product = gram.product_about_mean(weight, x)
    compare(product, weight.double() @ (x.double() - x.double().mean(dim=0)), 5.0 * len(x))
    return f"product {tuple(x.shape)}"


def try_sketch(draw: random.Random) -> str:
    x = matrix(draw, size(draw, 40), size(draw, 700))
    dim = draw.randint(1, 90)
    signs = torch.randint(2, (x.shape[1],)) * 2.0 - 1
    rotations = [draw.randrange(dim) for _ in range(-(-x.shape[1] // dim))]
    found = sketch.fold(x, signs, rotations, dim)
    if found is None:
        raise AssertionError("the kernel was not used")
    compare(found, _fold(x, signs.double(), rotations, dim), 10.0 + x.shape[1] / dim)
    return f"sketch {tuple(x.shape)} to {dim}"


def try_scattering(draw: random.Random) -> str:
    J, L = draw.randint(1, 3), draw.choice([1, 2, 3, 8, 9])
    height, width = (draw.randint(2**J, 2**J + 26) for _ in range(2))
    images = torch.rand(draw.randint(1, 3), draw.randint(1, 2), height, width)
    order = draw.choice([1, 2])
    compare(scattering(images, J, L, order), scattering(images.double(), J, L, order), 0.0)
    return f"scattering {tuple(images.shape)}, J={J}, L={L}, order {order}"


CASES: tuple[Callable[[random.Random], str], ...] = (
    try_gram,
    try_product,
    try_sketch,
    try_scattering,
)


def loaded(name: str) -> ctypes.CDLL:
    library = build.load_library(name)
    assert library is not None
    return library


def overrun_sketch() -> None:
    """A number more than there is."""
    x, signs, out = torch.ones(1, 64), torch.ones(65), torch.empty(1, 8)
    rotations = (ctypes.c_int64 * 9)()
    loaded("sketch").folded_sign_sketch(
        x.data_ptr(), 1, 65, 65, signs.data_ptr(), rotations, 8, out.data_ptr(), 1
    )


def overrun_gram() -> None:
    """A row more than there is."""
    x, out, peak = torch.randn(24, 64), torch.empty(25, 25), torch.empty(2)
    loaded("gram").centered_gram(x.data_ptr(), 25, 64, 64, out.data_ptr(), peak.data_ptr(), 1)


def overrun_scattering() -> None:
    """An image more than there is."""
    module = sys.modules[scattering.__module__]
    kernel, side = module._build_kernel(16, 16, 2, 4, 2), module.padded_size(16, 2)
    spectra = torch.randn(1, side, side, dtype=torch.complex64)
    out = torch.empty(2, *module.scattering_shape(16, 16, 2, 4, 2))
    loaded("scattering").scatterer_run(kernel._scatterer, spectra.data_ptr(), out.data_ptr(), 2, 1)


def signed() -> None:
    """A stride with which the place of the third row is beyond what an index holds."""
    x, out, peak = torch.randn(3, 64), torch.empty(3, 3), torch.empty(2)
    loaded("gram").centered_gram(x.data_ptr(), 3, 64, 2**62, out.data_ptr(), peak.data_ptr(), 1)


# What a kernel is told that is not so, which must be found.
FAULTS: dict[str, Callable[[], None]] = {
    "sketch": overrun_sketch,
    "gram": overrun_gram,
    "scattering": overrun_scattering,
    "signed": signed,
}


def main() -> None:
    """Draws the cases that the command line asks for, in a process that is watched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=300, help="of all kernels together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overrun", choices=FAULTS, help="make a fault, to see it found")
    arguments = parser.parse_args()
    if "ASAN_OPTIONS" not in os.environ:
        # Python and torch keep memory to the end, which is no leak of ours.
        os.environ.update(ASAN_OPTIONS="detect_leaks=0", LD_PRELOAD=preloaded())
        os.environ["MVMR_LOSS_NATIVE"] = "required"
        os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:]])
    del os.environ["LD_PRELOAD"]  # the compiler needs no watching
    build._FLAGS = (*build._FLAGS, *SANITIZERS)
    # By its name, under which a report finds the lines of its functions.
    folder._open = lambda _, path, name: ctypes.CDLL(str(path / name))
    gram._WORK_OF_A_THREAD = 1000  # so that small products have several threads, too
    if arguments.overrun:
        FAULTS[arguments.overrun]()
        raise SystemExit("the fault was not found")
    draw = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    for number in range(arguments.cases):
        torch.set_num_threads(draw.choice([1, 2, 3]))
        case = CASES[number % len(CASES)](draw)
        print(f"{number}: {case}, {torch.get_num_threads()} threads", flush=True)
    print(f"{arguments.cases} cases with seed {arguments.seed}: no fault")


if __name__ == "__main__":
    main()

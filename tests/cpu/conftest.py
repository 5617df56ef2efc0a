"""What the tests of the kernels share: a machine where nothing is compiled yet, and compilers."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mvmr_loss._cpu import build


@pytest.fixture
def kernels_on() -> None:
    """Skips where the kernels cannot be had; with MVMR_LOSS_NATIVE=required, as in CI, that fails."""
    if any(build.load_library(name) is None for name in build._SIGNATURES):
        pytest.skip("the kernels cannot be compiled here")


def forget() -> None:
    build._load.cache_clear()
    build.load_library.cache_clear()
    # The package exports the function of the same name.
    sys.modules["mvmr_loss.representations.scattering"]._build_kernel.cache_clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Makes a process that has loaded nothing, on a machine where nothing is compiled.

    Yields the folder that the user's cache and the temporary files are in.
    """
    monkeypatch.setenv("MVMR_LOSS_NATIVE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    forget()
    yield tmp_path
    forget()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns what compiles a C++ source, quickly, to a library that has the functions of sketch."""
    source = (Path(build.__file__).parent / "sketch.cpp").read_text()
    made: dict[str, Path] = {}

    def compile_(addition: str = "") -> Path:
        if addition not in made:
            folder = tmp_path_factory.mktemp("compiled")
            (folder / "it.cpp").write_text(source + addition)
            command = [*build._compiler(), "-fopenmp", "-shared", "-fPIC"]
            made[addition] = folder / "it.so"
            made[addition].write_bytes(build._compile(command, folder / "it.cpp"))
        return made[addition]

    return compile_


class Compiler:
    """A compiler that takes what it gives from a file, and writes down how it was called."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.path, self.library, self._log = folder / "compiler", folder / "library", folder / "log"
        self.library.write_bytes(library.read_bytes())
        library, log = shlex.quote(str(self.library)), shlex.quote(str(self._log))
        self.path.write_text(
            f'#!/bin/sh\necho "$@" >> {log}\nwhile [ "$1" != -o ]; do shift; done\n'
            f'sleep 0.2\ncp {library} "$2"\n'
        )
        self.path.chmod(0o700)

    @property
    def calls(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def compiler(
    fresh: Path, compiled: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Compiler:
    """Makes a compiler whose calls are counted the machine's."""
    (fresh / "bin").mkdir()
    compiler = Compiler(fresh / "bin", compiled(""))
    monkeypatch.setenv("CXX", str(compiler.path))
    return compiler

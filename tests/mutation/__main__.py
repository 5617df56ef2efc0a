"""Runs the tests against small faults put into the code, one at a time, and counts those unseen.

    python tests/mutation [FILE ...] [--sample N] [--seed S] [--budget SECONDS] [--again] [--results DIR]

The tree is copied, so that nothing else is disturbed. The tests are imported once; then each mutant is
tried in a fork, in which the functions are changed where they live, by the tests that run its lines, the
quickest first, until one fails. What cannot be changed so is imported anew with its tests. Known results
are kept; ``--again`` tries survivors again, after tests were added, and then by importing them as well.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, mutants
from swapping import Functions, living, swap

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_DEPENDENCE = [
    *("tests/dependence/test_edges.py", "tests/dependence/test_kernels.py"),
    *("tests/dependence/test_measures.py", "tests/dependence/test_blockwise.py"),
    *("tests/dependence/test_precision.py", "tests/dependence/test_rows.py"),
    *("tests/cpu/test_gram.py", "tests/test_loss_inputs.py", "tests/property/test_measures.py"),
    "tests/dependence/test_distance_correlation.py",
]
_LOSS = [
    *("tests/test_loss.py", "tests/test_loss_inputs.py", "tests/test_terms.py"),
    "tests/property/test_loss.py",
]
# Those that start no programs.
_CACHE = [f"tests/cache/test_{name}.py" for name in ("files", "store", "damage", "disk")]
_CACHE += ["tests/cache/test_dataset.py", "tests/cache/test_representations.py"]
# File -> the tests that are to see its faults.
TESTS = {
    "mvmr_loss/loss.py": _LOSS,
    "mvmr_loss/_objective.py": _LOSS,
    "mvmr_loss/regularizer.py": _LOSS,
    "mvmr_loss/dependence/matrices.py": _DEPENDENCE,
    "mvmr_loss/dependence/blocks.py": _DEPENDENCE,
    "mvmr_loss/dependence/points.py": _DEPENDENCE,
    "mvmr_loss/dependence/measures.py": _DEPENDENCE,
    "mvmr_loss/dependence/distance_correlation.py": _DEPENDENCE,
    "mvmr_loss/dependence/hsic.py": _DEPENDENCE,
    "mvmr_loss/dependence/registry.py": _DEPENDENCE,
    "mvmr_loss/dependence/definitions.py": ["tests/dependence/test_distance_correlation.py"],
    "mvmr_loss/dependence/cross.py": ["tests/dependence/test_cross.py"],
    "mvmr_loss/representations/sketch.py": ["tests/representations/test_sketch.py"],
    "mvmr_loss/cache/store.py": _CACHE,
    "mvmr_loss/cache/files.py": _CACHE,
    "mvmr_loss/cache/dataset.py": _CACHE,
    "mvmr_loss/cache/rows.py": _CACHE,
    "mvmr_loss/cache/metadata.py": _CACHE,
    "mvmr_loss/cache/folder.py": _CACHE,
    "mvmr_loss/cache/__main__.py": ["tests/cache/test_command.py"],
}
_OPTIONS = ("-q", "-m", "not slow", "-k", "not compile and not (blockwise and gradcheck)")
# A failure is all that is asked: to word it takes longer than most tests.
_OPTIONS += ("--tb=native", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist")


_ENDED = "the end of the process or of its time"


def in_fork(function: Callable[[], Any], seconds: float) -> Any:
    """Returns what a function returns in a process of its own; None if it dies or takes too long."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(read)
        log = os.open(os.environ.get("MUTATION_LOG", os.devnull), os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        with contextlib.suppress(BaseException), os.fdopen(write, "w") as pipe:
            json.dump(function(), pipe)
        os._exit(0)
    os.close(write)
    end, text = time.monotonic() + seconds, b""
    while select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(read, 2**16)
        if not part:
            break
        text += part
    os.close(read)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(text) if text else None


class Baseline:
    """A pytest plugin: notes each test's outcome, time, and the lines of some files that it runs."""

    def __init__(self, files: set[str]) -> None:
        self.files, self.tests = files, dict[str, Any]()
        self.lines = set[tuple[str, int]]()

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if file not in self.files:
            return None
        self.lines.add((file, frame.f_lineno))
        return self._trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.lines = set()
        self.tests[item.nodeid] = {"seconds": 0.0, "passed": True}
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            lines: dict[str, list[int]] = {}
            for file, line in sorted(self.lines):
                lines.setdefault(file, []).append(line)
            self.tests[item.nodeid]["lines"] = lines

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] += report.duration
        test["passed"] &= report.outcome == "passed"


class Killer:
    """A pytest plugin: runs chosen tests in a given order, and notes the first that fails."""

    def __init__(self, order: list[str]) -> None:
        self.place = {test: i for i, test in enumerate(order)}
        self.name = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.place),
            key=lambda item: self.place[item.nodeid],
        )

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.name = self.name or f"import of {report.nodeid}"

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.name = self.name or report.nodeid


class Loop:
    """A pytest plugin: in the place of running the tests, tries the mutants that can be swapped in."""

    def __init__(self, tree: Path, work: list[Work], budget: float, *, again: bool) -> None:
        self.tree, self.work, self.budget, self.again = tree, work, budget, again

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        functions = {record.file: living(str(self.tree / record.file)) for record, _ in self.work}
        gc.freeze()
        by_name = {item.nodeid: item for item in session.items}

        def run(order: list[str], plugin: Any) -> None:
            session.config.pluginmanager.register(plugin)
            items = [by_name[name] for name in order]
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if getattr(plugin, "name", ""):
                    break

        def record() -> dict[str, Any]:
            plugin = Baseline({str(self.tree / record.file) for record, _ in self.work})
            run(list(by_name), plugin)
            return plugin.tests

        tests = in_fork(record, 3 * 3600)
        for name, test in tests.items():
            if not test["passed"]:
                print(f"  left out, as it does not pass without a fault: {name}", flush=True)
        for record, left in self.work:
            file = str(self.tree / record.file)
            record.tests = {
                name: {**test, "lines": test["lines"][file]}
                for name, test in tests.items()
                if test["passed"] and file in test["lines"]
            }
            record.write()
            self._try(record, left, run, functions[record.file])
        return True

    def _try(
        self, record: Record, left: list[Mutant], run: Callable[..., None], functions: Functions
    ) -> None:
        """Tries the mutants of a file."""
        file = self.tree / record.file
        source = file.read_text()
        modules = [m for m in sys.modules.values() if getattr(m, "__file__", None) == str(file)]

        def attempt(mutant: Mutant, order: list[str]) -> str | None:
            if not all(swap(source, mutant.source, module, functions) for module in modules):
                return "?"
            killer = Killer(order)
            run(order, killer)
            return killer.name

        for mutant in left:
            order = seeing(mutant, record.tests, self.budget)
            seconds = 30 + 20 * sum(record.tests[name]["seconds"] for name in order)
            start = time.monotonic()
            killer = in_fork(lambda m=mutant, o=order: attempt(m, o), seconds)
            if killer is None:
                killer = _ENDED
            # By importing it, processes that the tests start see a fault as well.
            if killer != "?" and (killer or not self.again):
                record.add(mutant, killer, len(order), time.monotonic() - start)


class Record:
    """The results of one file, written after each mutant."""

    def __init__(self, file: str, folder: Path) -> None:
        self.file, self.path = file, folder / (file.removesuffix(".py").replace("/", ".") + ".json")
        self.mutants: dict[str, Any] = {}
        self.tests: dict[str, Any] = {}
        if self.path.exists():
            self.mutants = json.loads(self.path.read_text())["mutants"]

    def add(self, mutant: Mutant, killer: str, tests: int, seconds: float) -> None:
        """Adds what became of a mutant; no killer: it survives."""
        self.mutants[mutant.key] = {
            **{"line": mutant.first, "killed": bool(killer), "by": killer},
            **{"tests": tests, "seconds": round(seconds, 1)},
        }
        self.write()
        if not killer:
            print(f"  survives, line {mutant.first}: {mutant.key}", flush=True)

    def write(self) -> None:
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "file": self.file,
            "python": platform.python_version(),
            "torch": sys.modules["torch"].__version__,
            "processors": os.cpu_count(),
            "mutants": self.mutants,
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n")
        self.path.with_suffix(".tests").write_text(json.dumps(self.tests))


Work = tuple[Record, list[Mutant]]


def seeing(mutant: Mutant, tests: dict[str, Any], budget: float) -> list[str]:
    """Returns the tests that run a mutant's lines, the quickest first, of so many seconds in all."""
    changed = set(range(mutant.first, mutant.last + 1))
    # Lines that are run at the import belong to every test.
    everywhere = not any(changed & {*test["lines"]} for test in tests.values())
    names = [name for name, test in tests.items() if everywhere or changed & {*test["lines"]}]
    chosen, total = [], 0.0
    for name in sorted(names, key=lambda name: tests[name]["seconds"]):
        total += tests[name]["seconds"]
        if total <= budget or not chosen:
            chosen.append(name)
    return chosen


def enter(tree: Path) -> None:
    """Makes this process work in the tree."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    sys.dont_write_bytecode = True


def anew(tree: Path, record: Record, mutant: Mutant, budget: float) -> None:
    """Tries a mutant by importing it."""
    order = seeing(mutant, record.tests, budget)
    seconds = 120 + 20 * sum(record.tests[name]["seconds"] for name in order)

    def run() -> str:
        enter(tree)
        killer = Killer(order)
        files = {name.split("::")[0] for name in order}
        code = pytest.main(["-x", *_OPTIONS, *files], plugins=[killer])
        # What a conftest.py cannot import, no test reports.
        passed = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        return killer.name or ("" if passed else "import of a conftest.py")

    start, path = time.monotonic(), tree / record.file
    source = path.read_text()
    path.write_text(mutant.source)
    try:
        killer = in_fork(run, seconds)
    finally:
        path.write_text(source)
    if killer is None:
        killer = _ENDED
    record.add(mutant, killer, len(order), time.monotonic() - start)


def copied_tree() -> Path:
    """Returns a copy of all files that git knows or would add."""
    tree = Path(tempfile.mkdtemp(prefix="mutation-"))
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def drawn(found: list[Mutant], sample: int | None, seed: int) -> list[Mutant]:
    """Returns so many of a file's mutants, in their order; all of them where there are no more."""
    if sample is None or sample >= len(found):
        return found
    chosen = {m.key for m in random.Random(seed).sample(found, sample)}
    return [m for m in found if m.key in chosen]


def try_files(
    tree: Path,
    files: list[str],
    folder: Path,
    *,
    again: bool,
    budget: float,
    sample: int | None,
    seed: int,
) -> None:
    """Tries all faults of files that have the same tests, or a sample, going on from what is known."""
    work: list[Work] = []
    for file in files:
        record, found = Record(file, folder), list(mutants((tree / file).read_text()))
        known = record.mutants
        record.mutants = {m.key: known[m.key] for m in found if m.key in known}
        left = [m for m in drawn(found, sample, seed) if m.key not in known]
        if again:
            equal = equivalents().get(file, {})
            left = [m for m in found if m.key in known and not known[m.key]["killed"]]
            left = [m for m in left if m.key not in equal]
        print(f"{file}: {len(found)} mutants, {len(left)} to try", flush=True)
        if left:
            work.append((record, left))
    if work:
        before = {record.file: dict(record.mutants) for record, _ in work}
        tests = [*TESTS[files[0]], *(record.file for record, _ in work)]  # with their doctests

        def session() -> list[str]:
            enter(tree)
            pytest.main([*_OPTIONS, *tests], plugins=[Loop(tree, work, budget, again=again)])
            return sorted(name for name in sys.modules if name.split(".")[0] not in _OWN)

        for name in in_fork(session, 10**6):
            # What is imported here is not imported in each fork.
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
        gc.freeze()
        for file, left in [(record.file, left) for record, left in work]:
            record = Record(file, folder)
            record.tests = json.loads(record.path.with_suffix(".tests").read_text())
            for mutant in left:
                if record.mutants.get(mutant.key) == before[file].get(mutant.key):
                    anew(tree, record, mutant, budget)
            record.path.with_suffix(".tests").unlink()
    for file in files:
        print(summary(file, Record(file, folder).mutants), flush=True)


_OWN = ("mvmr_loss", "tests", "benchmarks", "conftest", "__main__", "mutants", "swapping")


def equivalents() -> dict[str, dict[str, str]]:
    """Returns file -> mutant -> why no test can see it."""
    listed: dict[str, dict[str, str]] = json.loads((HERE / "equivalent.json").read_text())
    return listed


def summary(file: str, tried: dict[str, Any]) -> str:
    """Returns the count of a file in a line."""
    equal = equivalents().get(file, {})
    others = [key for key in tried if key not in equal]
    killed = sum(tried[key]["killed"] for key in others)
    share = killed / max(1, len(others))
    return f"{file}: {killed} of {len(others)} die ({share:.1%}); {len(tried) - len(others)} equivalent"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/mutation")
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--again", action="store_true", help="try survivors anew")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests a mutant")
    parser.add_argument("--sample", type=int, help="so many mutants a file; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    os.environ["MVMR_PROPERTY_AS_DRAWN"] = "1"
    tree = copied_tree()
    try:
        for tests in {str(TESTS[file]): TESTS[file] for file in arguments.files}.values():
            try_files(
                *(tree, [f for f in arguments.files if TESTS[f] == tests]),
                arguments.results.resolve(),
                again=arguments.again,
                budget=arguments.budget,
                sample=arguments.sample,
                seed=arguments.seed,
            )
    finally:
        shutil.rmtree(tree)


if __name__ == "__main__":
    main()

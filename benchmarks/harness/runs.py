"""Planned runs: one file each, and a run whose file is there is not repeated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.harness.records import environment, portable, validate, write_json

Record = dict[str, Any]


class Run(NamedTuple):
    """One planned run.

    Attributes:
        name: Its file is ``FOLDER/name.json``; it may have ``/`` in it.
        settings: All that determines the result but the seed: options, data, epochs, ...; never where
            it is written.
        seed: Of all that is drawn; None where nothing is.
    """

    name: str
    settings: Mapping[str, Any]
    seed: int | None = None


def record(run: Run, figures: Mapping[str, Any]) -> Record:
    """Returns what is written of a run, checked.

    Args:
        run: The run.
        figures: What it found: plain JSON values, also nested.

    Returns:
        The record, as benchmarks/README.md says.

    Raises:
        ValueError: If it does not follow the schema.
    """
    whole = {
        "name": run.name,
        "settings": portable(run.settings),
        "seed": run.seed,
        "figures": portable(figures),
        **environment(),
    }
    validate(whole, run.name)
    return whole


def check_run(run: Run) -> None:
    """Raises, before a run, what :func:`record` would raise of all but its figures after it.

    Args:
        run: The planned run.

    Raises:
        ValueError: If its settings cannot stand in a record.

    Examples:
        >>> check_run(Run("power", {"exponent": float("inf")}))
        Traceback (most recent call last):
        ValueError: power: settings.exponent must be finite but is inf.
    """
    record(run, {"none": None})


def run_all(
    plan: Iterable[Run],
    folder: str | Path,
    run_one: Callable[[Run], Mapping[str, Any]],
    *,
    limit: int | None = None,
    again: bool = False,
    minutes: float | None = None,
) -> bool:
    """Makes the results that are not there yet, in the order of the plan, each in a file of its own.

    A file is written whole when its run ends, so that the same command continues after a stop, and
    several processes can share a plan: what another is making is passed over. The plan may be a
    generator: what comes after a ``yield`` sees the results before it, or waits for them by
    :func:`wait_for`.

    Args:
        plan: The runs.
        folder: Where the files are.
        run_one: From a run to its figures.
        limit: At most as many runs now; None is all.
        again: Whether to make results anew that are there.
        minutes: No run begins later; None is no end.

    Returns:
        Whether all results of the plan are there now.

    Raises:
        ValueError: If a result is there that other settings or another seed made, or that does not
            follow the schema; or if a run's settings cannot stand in one.

    Examples:
        >>> import tempfile
        >>> plan = [Run(f"square-seed{seed}", {"power": 2}, seed) for seed in (2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = run_all(plan, folder, lambda run: {"value": run.seed ** run.settings["power"]})
        ...     done, [result["figures"]["value"] for result in load(folder)]
        (True, [4, 9])
    """
    made, begun, passed_over = 0, time.monotonic(), False
    for run in plan:
        path = Path(folder) / f"{run.name}.json"
        if path.exists() and not again:
            _check_same(read(path), run, path)
            continue
        late = minutes is not None and time.monotonic() - begun > 60 * minutes
        if late or (limit is not None and made >= limit):
            return False
        with _claim(path) as claimed:
            # Another process may have ended it since.
            if not claimed or (path.exists() and not again):
                passed_over = True
                continue
            check_run(run)
            print(f"{run.name}: running", file=sys.stderr, flush=True)
            write_json(path, record(run, run_one(run)))
            made += 1
    return not passed_over


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Yields whether this process alone is to make a result; gives it free if the process ends."""
    mark = path.with_name(f".{path.name}.claim")
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.open("w") as file:
        claimed = _locked(file)
        try:
            yield claimed
        finally:
            if claimed:
                mark.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool:
    """Locks a file, and returns whether nobody else has; where there are no locks, nobody has."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for(paths: Iterable[Path]) -> None:
    """Waits until other processes have made results.

    Args:
        paths: Their files.

    Raises:
        FileNotFoundError: If one is not there and nobody is making it.
    """
    for path in paths:
        while not path.exists():
            with _claim(path) as claimed:
                if claimed and not path.exists():
                    raise FileNotFoundError(
                        f"{portable(path)} must be there, or another process must be making it: run "
                        "what is planned before it."
                    )
            time.sleep(0.1)


def place_of_best(paths: Iterable[Path], *names: str) -> int:
    """Returns which result has the largest figure; waits for other processes as :func:`wait_for` does.

    Args:
        paths: The results' files.
        *names: Where the figure stands in a result's figures, from the outside in.

    Raises:
        FileNotFoundError: As :func:`wait_for`.
    """
    paths = list(paths)
    wait_for(paths)
    found = []
    for path in paths:
        value = json.loads(path.read_text())["figures"]
        for name in names:
            value = value[name]
        found.append(value)
    return found.index(max(found))


def run_in_processes(count: int, command: Sequence[str]) -> None:
    """Runs a command several times at once, the copies sharing its plan, and waits for all.

    Args:
        count: How many.
        command: Words after ``python -m``.

    Raises:
        SystemExit: If one of them failed; the others go on.
    """
    line = [sys.executable, "-m", *command]
    processes = [subprocess.Popen(line) for _ in range(count)]
    failed = sum(process.wait() != 0 for process in processes)
    if failed:
        raise SystemExit(f"{failed} of {count} processes failed")


def read(path: Path) -> Record:
    """Reads and checks one result file.

    Args:
        path: The file.

    Returns:
        The record.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no JSON or does not follow the schema.
    """
    try:
        content: Record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{portable(path)} must be JSON but cannot be read: {error}") from error
    validate(content, str(portable(path)))
    return content


def load(folder: str | Path, pattern: str = "**/*.json") -> list[Record]:
    """Reads and checks the results of a folder, sorted by file name.

    Args:
        folder: Where the files are; one that is not there has none.
        pattern: Which files, for :meth:`pathlib.Path.glob`.

    Returns:
        The records.

    Raises:
        ValueError: If a file does not follow the schema.
    """
    return [read(p) for p in sorted(Path(folder).glob(pattern)) if not p.name.startswith(".")]


def _check_same(found: Record, run: Run, path: Path) -> None:
    """Raises if a result was made by other settings or another seed than the plan's."""
    for name, wanted in (("settings", portable(run.settings)), ("seed", run.seed)):
        # Through JSON, which knows no tuples and no keys but strings.
        wanted = json.loads(json.dumps(wanted))
        if found[name] == wanted:
            continue
        then, now = found[name], wanted
        if name == "settings":
            keys = [k for k in then | now if then.get(k) != now.get(k)]
            then, now = ({k: side.get(k) for k in keys} for side in (then, now))
        raise ValueError(
            f"{portable(path)} was made with other {name} ({then}, now {now}); use the "
            "same ones, write into another folder, or remove the file."
        )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends a command with one sentence for what is wrong with its input, or when it is stopped."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: run the same command again to continue.") from None

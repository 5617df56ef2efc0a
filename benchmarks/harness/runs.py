"""Planned runs: one file each, and a run whose file is there is not repeated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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


def run_all(
    plan: Iterable[Run],
    folder: str | Path,
    run_one: Callable[[Run], Mapping[str, Any]],
    *,
    limit: int | None = None,
    again: bool = False,
) -> bool:
    """Makes the results that are not there yet, in the order of the plan, each in a file of its own.

    A file is written whole when its run ends, so that the same command continues after a stop. The
    plan may be a generator: what comes after a ``yield`` sees the results before it.

    Args:
        plan: The runs.
        folder: Where the files are.
        run_one: From a run to its figures.
        limit: At most as many runs now; None is all.
        again: Whether to make results anew that are there.

    Returns:
        Whether all results of the plan are there now.

    Raises:
        ValueError: If a result is there that other settings or another seed made, or that does not
            follow the schema.

    Examples:
        >>> import tempfile
        >>> plan = [Run(f"square-seed{seed}", {"power": 2}, seed) for seed in (2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = run_all(plan, folder, lambda run: {"value": run.seed ** run.settings["power"]})
        ...     done, [result["figures"]["value"] for result in load(folder)]
        (True, [4, 9])
    """
    made = 0
    for run in plan:
        path = Path(folder) / f"{run.name}.json"
        if path.exists() and not again:
            _check_same(read(path), run, path)
            continue
        if limit is not None and made >= limit:
            return False
        print(f"{run.name}: running", file=sys.stderr, flush=True)
        write_json(path, record(run, run_one(run)))
        made += 1
    return True


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

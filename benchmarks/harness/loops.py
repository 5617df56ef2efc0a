"""Progress of long loops: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    description: str | None,
    total: int | None = None,
    *,
    unit: str = "step",
    interval: float = 10.0,
) -> Iterator[T]:
    """Yields what the iterable yields and tells on stderr how far it is.

    On a terminal it is a bar. Elsewhere it is a line after the first item, one every ``interval``
    seconds, and one at the end.

    Args:
        iterable: What is gone through.
        description: What is being done; None tells nothing.
        total: Number of items; None means the iterable's length.
        unit: What one item is called.
        interval: Seconds between two lines.

    Returns:
        An iterator over the same items.

    Examples:
        >>> list(progress("ab", "reading", unit="letter"))
        ['a', 'b']
    """
    if description is None:
        yield from iterable
        return
    if total is None:
        total = len(iterable)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from tqdm(iterable, description, total, unit=unit, leave=False)
        return
    start = time.monotonic()
    due = start
    units = f"{unit}es" if unit.endswith("tch") else f"{unit}s"
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now >= due or done == total:
            print(
                f"{description}: {done} of {total} {units}, {now - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            due = now + interval

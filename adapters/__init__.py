"""MV-MR inside other frameworks; each adapter imports its host, and nothing else does.

Here is what all hosts share: defaults, and one meaning of the options ``cache`` and ``fill_cache``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# The five that the authors' release trains with.
PAPER_REPRESENTATIONS = ("pixels", "augmented_pixels", "scattering", "hog", "local_std")

# Where a host trains in several processes, the loss is that of the whole batch unless told
# otherwise: with it, a batch means the same on one device and on eight.
GATHER_DISTRIBUTED = True


def check_cache(cache: str | os.PathLike[str] | Mapping[str, Any] | None, fill_cache: bool) -> None:
    """Raises unless the store of a host's option ``cache`` is there, or there shall be one or none.

    Args:
        cache: What :class:`~mvmr_loss.Representations` takes.
        fill_cache: Whether the store is made if there is none, and filled in the first epoch.

    Raises:
        ValueError: If it is missing.
    """
    path = cache.get("path") if isinstance(cache, Mapping) else cache
    if path is not None and not fill_cache and not os.path.exists(path):
        raise ValueError(
            "cache must be the folder of a store of representations but there is none at "
            f"{os.fspath(path)!r}; set fill_cache to True to have it made and filled in the first "
            "epoch, or leave cache out."
        )

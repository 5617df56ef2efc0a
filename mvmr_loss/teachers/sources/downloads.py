"""Downloads that fail at once, with what to do, where there is no network."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

_PROBE_SECONDS = 3.0


@contextmanager
def downloading(what: str) -> Iterator[None]:
    """Runs what may download; what is in a library's cache is used without a network.

    Args:
        what: What is downloaded, for the error.

    Raises:
        ConnectionError: If it is not in the cache and cannot be downloaded.
    """
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        constants = None
    # The hub retries for a minute; offline, it looks into its cache alone.
    offline = constants is not None and not constants.HF_HUB_OFFLINE and not _reachable(constants)
    if offline:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if _is_of_the_network(error):
            raise ConnectionError(
                f"{what} cannot be downloaded ({(str(error) or repr(error)).splitlines()[0]}); where "
                "there is no network, give a local file as weights."
            ) from error
        raise
    finally:
        if offline:
            constants.HF_HUB_OFFLINE = False


def _is_of_the_network(error: BaseException | None) -> bool:
    """Tells whether an error is, or comes from, a failed download; libraries wrap it."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reachable(constants: Any) -> bool:
    """Tells whether the hub answers; behind a proxy it is taken to."""
    if getproxies():
        return True
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True

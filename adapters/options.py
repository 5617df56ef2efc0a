"""Options of commands: ``NAME=VALUE``, the value JSON or else a string."""

from __future__ import annotations

import argparse
import json
from typing import Any


def option(text: str) -> tuple[str, Any]:
    """Returns the name and the value of ``NAME=VALUE``; the value is JSON, or else a string.

    Examples:
        >>> option("lr=0.001"), option("backbone=resnet18"), option('representations=["hog"]')
        (('lr', 0.001), ('backbone', 'resnet18'), ('representations', ['hog']))
    """
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE but is {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value

"""Trains as a YAML file of stable-pretraining says.

``python -m mvmr_loss.adapters.stable_pretraining CONFIG KEY=VALUE ...``

It is what ``spt run`` is for, which fails in version 0.1.8 whatever the configuration is: it gives its
``Manager`` an argument that there is none of. All is done by the host's own functions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MINIMUM_STABLE_PRETRAINING = "0.1.8"


def main(arguments: Sequence[str]) -> None:
    """Trains as a configuration says.

    Args:
        arguments: The path of a YAML file with ``data``, ``module`` and ``trainer``, and ``KEY=VALUE``
            for whatever takes the place of what stands there.

    Raises:
        SystemExit: If there is no such file, it lacks a part, a value that must be given is missing, or
            the host is not installed.
    """
    parser = argparse.ArgumentParser(prog="python -m mvmr_loss.adapters.stable_pretraining")
    parser.add_argument("config", type=Path, help="a YAML file with data, module and trainer")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as root=images")
    settings = parser.parse_args(arguments)
    if not settings.config.is_file():
        raise SystemExit(f"Error: {settings.config} must be a YAML file but is none.")
    for override in settings.overrides:
        if "=" not in override:
            raise SystemExit(f"Error: {override!r} must be KEY=VALUE.")

    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from stable_pretraining import Manager
        from stable_pretraining.config import recursive_instantiate
    except ImportError as error:
        raise SystemExit(
            "Error: mvmr_loss.adapters.stable_pretraining needs stable-pretraining, which cannot be "
            f"imported ({error}); install it with: "
            f"pip install 'stable-pretraining>={MINIMUM_STABLE_PRETRAINING}'"
        ) from error

    config: Any
    try:
        config = OmegaConf.merge(
            OmegaConf.load(settings.config), OmegaConf.from_dotlist(settings.overrides)
        )
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SystemExit(f"Error: {settings.config}: {error}") from error
    parts = ("data", "module", "trainer")
    lacking = [part for part in parts if part not in config]
    if lacking:
        raise SystemExit(f"Error: {settings.config} must have {', '.join(lacking)} but has not.")
    built = recursive_instantiate({part: config[part] for part in ("data", "module")})
    for part, made in built.items():
        if OmegaConf.is_config(made):  # the host warns of the cause, and goes on
            raise SystemExit(f"Error: {part} of {settings.config} cannot be built; see above.")
    # The trainer's callbacks get the module from the manager.
    Manager(trainer=config.trainer, seed=config.get("seed"), **built)()


if __name__ == "__main__":
    main(sys.argv[1:])

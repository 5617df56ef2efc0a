"""Attacks that are longer than a test: ``python -m tests.trust store`` and ``python -m tests.trust soak``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.results import environment, write_json
from tests.trust import soak, store


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("store", store), ("soak", soak)):
        command = commands.add_parser(name, description=module.__doc__)
        command.add_argument("--output", type=Path, help="JSON file for the figures")
        module.add_options(command)
        command.set_defaults(attack=module.attack)
    settings = parser.parse_args(arguments)
    figures, faults = settings.attack(settings)
    if settings.output is not None:
        write_json(
            settings.output,
            {**environment(settings.seed), "figures": figures, "faults": faults},
        )
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

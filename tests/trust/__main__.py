"""Attacks that are longer than a test: ``python -m tests.trust store``, ``soak`` and ``precision``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness.records import environment, portable, validate, write_json
from tests.trust import precision, soak, store


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("store", store), ("soak", soak), ("precision", precision)):
        command = commands.add_parser(name, description=module.__doc__)
        command.add_argument("--output", type=Path, help="JSON file for the figures")
        module.add_options(command)
        command.set_defaults(attack=module.attack)
    settings = parser.parse_args(arguments)
    figures, faults = settings.attack(settings)
    figures["faults"] = faults
    if settings.output is not None:
        ours = ("command", "output", "attack", "seed")
        given = {name: portable(v) for name, v in vars(settings).items() if name not in ours}
        record = {"name": settings.command, "settings": given, "seed": settings.seed}
        record |= {"figures": figures, **environment()}
        validate(record)
        write_json(settings.output, record)
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

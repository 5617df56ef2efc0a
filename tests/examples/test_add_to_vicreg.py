"""The VICReg example, with the representation terms and with the lines that add them taken out."""

from pathlib import Path

from benchmarks.common.photographs import Photographs
from examples import add_to_vicreg

SOURCE = Path(add_to_vicreg.__file__)
ARGUMENTS = ["--epochs", "3", "--batch-size", "48"]


def few(split, transform=None):
    count = 48 if split == "train" else 12
    return Photographs(split, crops_per_class=count, transform=transform)


def test_trains(monkeypatch):
    monkeypatch.setattr(add_to_vicreg, "Photographs", few)
    losses, accuracy = add_to_vicreg.main(ARGUMENTS)
    assert losses[-1] < losses[0]
    assert accuracy > 2 * 100 / 11  # twice chance


def test_without_the_marked_lines_it_is_plain_vicreg():
    lines = SOURCE.read_text().splitlines(keepends=True)
    plain = [line for line in lines if not line.endswith("# MV-MR\n")]
    assert len(lines) - len(plain) == 10
    names = {"__name__": "plain_vicreg", "__doc__": "Plain VICReg."}
    exec(compile("".join(plain), SOURCE, "exec"), names)
    assert "Representations" not in names
    names["Photographs"] = few
    losses, _ = names["main"]([*ARGUMENTS[2:], "--epochs", "1"])
    assert len(losses) == 1
    assert losses[0] > 0

import json
import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    Run,
    interleaved,
    load,
    medians,
    place_of_best,
    plain_errors,
    plot_points,
    ratio,
    record,
    run_all,
    run_in_processes,
    runs,
    spread,
    table,
    validate,
    wait_for,
    write_between,
)

ROOT = Path(__file__).parents[2]


def plan(count=3, **settings):
    return [Run(f"part/run-seed{seed}", {"epochs": 2, **settings}, seed) for seed in range(count)]


def test_finished_runs_are_skipped_and_a_stop_leaves_no_half_result(tmp_path):
    seen = []

    def run_one(run):
        seen.append(run.seed)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return {"loss": float(run.seed)}

    with pytest.raises(SystemExit, match="run the same command again"), plain_errors():
        run_all(plan(), tmp_path, run_one)
    assert [file.name for file in tmp_path.rglob("*.json")] == ["run-seed0.json"]
    assert run_all(plan(), tmp_path, run_one)
    assert seen == [0, 1, 1, 2]
    assert [r["figures"]["loss"] for r in load(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_what_a_record_refuses_is_found_before_the_run(tmp_path, value):
    seen = []
    with pytest.raises(ValueError, match=r"part/run-seed0: settings.options.value must be "):
        run_all(plan(options={"value": value}), tmp_path, seen.append)
    assert seen == []


SHARED = """
import sys, time
from benchmarks.harness import Run, run_all, wait_for
from pathlib import Path

folder = Path(sys.argv[1])

def plan():
    for seed in range(6):
        yield Run(f"one/{seed}", {}, seed)
    wait_for([folder / f"one/{seed}.json" for seed in range(6)])
    yield Run("last", {})

def run_one(run):
    with (folder / "log").open("a") as file:
        file.write(run.name + "\\n")
    time.sleep(0.2)
    return {"value": 1}

run_all(plan(), folder, run_one)
"""


def test_processes_share_a_plan(tmp_path, monkeypatch):
    """Each run is made once, and what needs others waits for them."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shared_plan.py").write_text(SHARED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    folder = tmp_path / "results"
    folder.mkdir()
    run_in_processes(3, ["shared_plan", str(folder)])
    made = (folder / "log").read_text().split()
    assert sorted(made) == sorted({*(f"one/{seed}" for seed in range(6)), "last"})
    assert made[-1] == "last"
    assert not list(folder.rglob("*.claim"))
    with pytest.raises(SystemExit, match="2 of 2 processes failed"):
        run_in_processes(2, ["no_such_module"])


def test_what_another_process_makes_is_passed_over(tmp_path):
    path = tmp_path / "part" / "run-seed1.json"
    with runs._claim(path) as claimed:
        assert claimed
        with runs._claim(path) as again:
            assert not again
        assert not run_all(plan(), tmp_path, lambda run: {"a": 1})
    assert sorted(p.name for p in tmp_path.rglob("*.json")) == ["run-seed0.json", "run-seed2.json"]
    assert run_all(plan(), tmp_path, lambda run: {"a": 1})


def test_nobody_waits_for_what_nobody_makes(tmp_path):
    with pytest.raises(FileNotFoundError, match="one.json must be there, or another process"):
        wait_for([tmp_path / "one.json"])
    (tmp_path / "one.json").write_text("{}")
    wait_for([tmp_path / "one.json"])


def test_no_run_begins_when_the_time_is_up(tmp_path):
    assert not run_all(plan(), tmp_path, lambda run: {"a": 1}, minutes=-1)
    assert load(tmp_path) == []
    assert run_all(plan(), tmp_path, lambda run: {"a": 1}, minutes=10)


def test_limit_again_and_lazy_plans(tmp_path):
    assert not run_all(plan(), tmp_path, lambda run: {"a": 1}, limit=2)
    assert len(load(tmp_path)) == 2
    assert run_all(plan(), tmp_path, lambda run: {"a": 2}, limit=1)
    assert [r["figures"]["a"] for r in load(tmp_path)] == [1, 1, 2]
    assert run_all(plan(), tmp_path, lambda run: {"a": 3}, again=True)
    assert [r["figures"]["a"] for r in load(tmp_path)] == [3, 3, 3]

    def lazy():
        yield Run("first", {})
        best = load(tmp_path, "first.json")[0]["figures"]["best"]
        yield Run("second", {"chosen": best})

    run_all(lazy(), tmp_path, lambda run: {"best": 7})
    assert load(tmp_path, "second.json")[0]["settings"] == {"chosen": 7}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            Run("a", {"epochs": 3, "widths": (1, 2)}, 0),
            "settings ({'epochs': 2}, now {'epochs': 3})",
        ),
        (Run("a", {"epochs": 2, "widths": (1, 2), "new": 1}, 0), "settings ({'new': None}"),
        (Run("a", {"epochs": 2, "widths": (1, 2)}, 1), "other seed (0, now 1)"),
    ],
)
def test_a_result_of_other_settings_is_an_error(tmp_path, other, told):
    run_all([Run("a", {"epochs": 2, "widths": (1, 2)}, 0)], tmp_path, lambda run: {"x": 1})
    assert run_all([Run("a", {"epochs": 2, "widths": [1, 2]}, 0)], tmp_path, lambda run: {"x": 1})
    with pytest.raises(ValueError, match=re.escape(told)):
        run_all([other], tmp_path, lambda run: {"x": 1})


def change(found, field, value):
    if value is None:
        del found[field]
    else:
        found[field] = value
    return found


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("command", None, "must have the field 'command'"),
        ("date", None, "must have the field 'date'"),
        ("date", "25 November", "date must be the day, YYYY-MM-DD"),
        ("seed", 0.5, "seed must be an integer"),
        ("seed", True, "seed must be an integer"),
        ("figures", {}, "figures must be a mapping with at least one"),
        ("machine", {"cpu": "x"}, "machine must be a mapping with cpu, cores"),
        ("code", {"commit": "x"}, "code must be a mapping with commit, changed"),
        ("extra", 1, "unknown field 'extra'"),
        ("figures", {"a": [1.0, float("nan")]}, r"figures.a\[1\] must be finite"),
        (
            "settings",
            {"a": {"b": "in /data/images now"}},
            "settings.a.b must hold no absolute path",
        ),
        ("settings", {"a": torch.ones(1)}, "settings.a must be plain JSON but is Tensor"),
    ],
)
def test_validate_names_the_field(field, value, told):
    with pytest.raises(ValueError, match=told):
        validate(change(record(plan()[0], {"a": 1}), field, value))


def test_records_have_a_note_or_none_and_no_other_place():
    found = record(Run("a", {"images": "/data/cifar/train", "path": Path("runs/a")}), {"a": 1})
    assert found["settings"] == {"images": ".../cifar/train", "path": "runs/a"}
    validate({**found, "note": "converted"})
    with pytest.raises(ValueError, match="must hold a JSON object but holds list"):
        validate([found])


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "half.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"half\.json must be JSON"):
        load(tmp_path)


def test_interleaved_takes_turns_and_ratio_pairs_rounds():
    ran = []
    times = interleaved(
        {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=3, warmup=1
    )
    assert "".join(ran) == "baabbaab"
    assert [len(values) for values in times.values()] == [3, 3]
    assert set(medians(times)) == {"a", "b"}
    # A round in which everything is slow changes nothing.
    assert ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == (0.5, 0.0)
    assert ratio([1.0], [4.0]) == (0.25, 0.0)
    with pytest.raises(ValueError, match="have 2 and 1"):
        ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        interleaved({}, repeats=0)


def test_write_between_keeps_the_rest_of_the_page(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Title\n\n<!-- a -->\nold\n<!-- end of a -->\n\nwords\n")
    write_between(page, "a", "new\n\n")
    assert page.read_text() == "# Title\n\n<!-- a -->\nnew\n<!-- end of a -->\n\nwords\n"
    write_between(page, "b", "x")
    assert page.read_text().endswith("\n\nwords\n\n<!-- b -->\nx\n<!-- end of b -->\n")
    page.write_text("<!-- end of a --><!-- a -->")
    with pytest.raises(ValueError, match="once each"):
        write_between(page, "a", "x")
    write_between(tmp_path / "new.md", "a", "x")
    assert (tmp_path / "new.md").read_text() == "<!-- a -->\nx\n<!-- end of a -->\n"


def test_tables_and_plots(tmp_path):
    text = table(["a", "b", "c"], [["x", 0.12345, None], ["y", "<= 3", ""]])
    assert text.splitlines() == [
        "| a | b | c |",
        "| --- | ---: | --- |",
        "| x | 0.123 |  |",
        "| y | <= 3 |  |",
    ]
    with pytest.raises(ValueError, match="must have 2 cells"):
        table(["a", "b"], [["x"]])
    assert spread([1.0, 3.0]) == "2.0 ± 1.4"
    groups = {"ours": [1.0, 2.0], "theirs": [3.0]}
    plot_points(
        tmp_path / "a.png", groups, "x", ours=["ours"], goals={"ours": 1}, line=("one", 1), log=True
    )
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_new_benchmark_of_the_readme_works(tmp_path, monkeypatch):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    file = tmp_path / "__main__.py"
    file.write_text(code)
    exec(compile(code, str(file), "exec"), {"__name__": "__main__", "__file__": str(file)})
    assert "| 128 | 52.3 ± 1.0 |" in (tmp_path / "RESULTS.md").read_text()
    assert len(json.loads((tmp_path / "results" / "width-64-seed2.json").read_text())) == 9


def test_the_place_of_the_best(tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    with pytest.raises(FileNotFoundError, match="0.json must be there"):
        place_of_best(paths, "linear")
    for path, linear in zip(paths, (1.0, 3.0, 2.0), strict=True):
        path.write_text(f'{{"figures": {{"linear": {linear}, "deep": {{"knn": {-linear}}}}}}}')
    assert place_of_best(paths, "linear") == 1
    assert place_of_best(paths, "deep", "knn") == 0

"""Every command of the README and the pages is run, by these tests or by one that is named here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = ("lightly", "solo", "stable_pretraining", "timm", "torchdistill")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if not {"_build", "gallery"} & {*path.parts}
]
PAGES += [ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "stl10" / "README.md"]
PAGES += sorted((ROOT / "benchmarks").glob("*/RESULTS.md"))
GUIDES = [ROOT / "adapters" / host / "README.md" for host in sorted(HOSTS)]
FIRST_WORDS = (
    "pip",
    "python",
    "make",
    "pre-commit",
    "git",
    "cp",
    "torchrun",
    "pytest",
    "nox",
    r"\.{3}",
)
# Variables of the environment may stand before it.
PROGRAM = re.compile(rf"(\w+=\S+ )*({'|'.join(FIRST_WORDS)}) \S")

# From a fresh checkout, in a fresh environment, one after the other.
INSTALLING = [
    "pip install .",
    "pip install . torchvision",
    "pip install '.[lightly]'",
    "pip install '.[solo]'",
    "pip install '.[benchmarks]'",
    "pip install '.[distillation]'",
    "pip install '.[examples]'",
    "pip install '.[metrics]'",
    "pip install '.[timm]'",
    "pip install open_clip_torch",
    "pip uninstall solo-learn",
    "pip install build",
    "python -m build --wheel",
    "pip install dist/mvmr_loss-*.whl",
    "pip wheel --no-deps -w dist .",
    'pip install "$(echo dist/mvmr_loss-*.whl)[lightly]"',
    'pip install "$(echo dist/mvmr_loss-*.whl)[solo]"',
    "pre-commit install",
]
# From a folder with images in FOLDER.
CACHING = [
    "python -m mvmr_loss.cache fill STORE --data FOLDER --image-size 96 --representations pixels "
    "scattering hog local_std --sketch-dim 1024",
    "python -m mvmr_loss.cache verify STORE",
    "python -m mvmr_loss.cache info STORE",
]
ELSEWHERE = {
    "python -m benchmarks.import_time --runs 9": "tests/docs/test_commands.py::test_import_time",
    "python -m mvmr_loss": "tests/docs/test_commands.py::test_kernels_are_told_as_the_page_says",
    # An hour: what it collects, and with which seed, is tried; the tests are those of `make test-slow`.
    "MVMR_PROPERTY_SEED=new pytest -m slow tests/property": (
        "tests/docs/test_commands.py::test_a_new_seed_is_drawn_and_told"
    ),
    # Hours: its parts are tried.
    "python tests/mutation": "tests/mutation/test_mutation.py::test_every_file_named_is_there",
    # Minutes each: tried at small scales.
    "python -m tests.trust store": "tests/trust/test_store.py::test_command",
    "python -m tests.trust precision": "tests/trust/test_precision.py::test_command",
    "python tests/cpu/sanitized.py": "tests/cpu/test_sanitized.py::test_no_fault_is_found",
    # In an environment of its own: it clashes with solo-learn.
    "pip install '.[stable-pretraining]'": "noxfile.py::.[stable-pretraining]",
    "pip install '.[torchdistill]'": "noxfile.py::.[torchdistill]",
    "torchrun --nproc-per-node 2 examples/several_processes.py": (
        "tests/examples/test_examples.py::test_several_processes_as_written"
    ),
    "make run": "tests/test_makefile.py::test_run_trains",
    "make test": ".ci/run::make test ",
    "make test-slow": ".ci/run::make test-slow",
    "make lint": ".ci/run::make lint",
    "make docs": "tests/docs/test_site.py::test_strict_build",
    "nox --sessions stable_pretraining torchdistill wheel_here": (
        ".ci/run::--sessions stable_pretraining torchdistill wheel_here"
    ),
    "python examples/log_terms.py --logger csv tensorboard wandb": (
        "tests/examples/test_examples.py::test_terms_reach_every_logger"
    ),
}
# Of the hosts' guides: how a command begins -> the test that reads it there and runs it.
HOST_TESTS = "tests/adapters/test_"
OF_GUIDES = {
    "python -m mvmr_loss.adapters.lightly --model preset": (
        "lightly_script.py::test_beside_a_method_of_lightly"
    ),
    "python -m mvmr_loss.adapters.lightly --model lr": "lightly_script.py::test_vitb16_script",
    "python -m mvmr_loss.adapters.lightly --model 'loss": "lightly_script.py::test_resnet50_script",
    "python -m mvmr_loss.adapters.lightly --model 'representations": (
        "lightly_script.py::test_a_teacher_that_is_kept_then_alone"
    ),
    "python main_pretrain.py --config-name mvmr_cifar10": (
        "solo_scripts.py::test_main_pretrain_with_the_installed_plugin"
    ),
    "python main_linear.py": "solo_scripts.py::test_main_linear",
    "python main_pretrain.py --config-path": (
        "solo_scripts.py::test_another_method_with_the_regularizer"
    ),
    "python -m mvmr_loss.adapters.solo main_knn.py": "solo_scripts.py::test_main_knn",
    "python -m mvmr_loss.adapters.solo main_umap.py": "solo_scripts.py::test_main_umap",
    "cp \"$(python -c 'import mvmr_loss.adapters.stable_pretraining": (
        "stable_pretraining_host.py::test_the_configuration_runs"
    ),
    "python -m mvmr_loss.adapters.stable_pretraining": (
        "stable_pretraining_host.py::test_the_configuration_runs"
    ),
    "python -m mvmr_loss.adapters.timm": "timm_task.py::test_the_guide_runs",
    "python -m mvmr_loss.cache fill features": (
        "solo_methods.py::test_the_guides_store_fits_the_guides_pipelines"
    ),
    "python -m mvmr_loss.cache fill runs/teacher": (
        "lightly_method.py::test_the_guides_store_fits_the_guides_transform"
    ),
    "python examples/stable_pretraining_mvmr.py": (
        "stable_pretraining_host.py::test_the_example_runs_from_anywhere"
    ),
    "python examples/timm_dependence.py": "timm_task.py::test_the_example_runs_from_anywhere",
    "python examples/torchdistill_dependence.py": (
        "torchdistill.py::test_the_example_runs_from_anywhere"
    ),
}
# Of the benchmarks' pages: how a command begins -> the test that runs the same at small sizes.
BENCHMARK_TESTS = "tests/benchmarks/test_"
OF_BENCHMARKS = {
    "python -m benchmarks.NAME": "harness_runs.py::test_the_new_benchmark_of_the_readme_works",
    "python -m benchmarks.cache": "cache_benchmark.py::test_one_command",
    "python -m benchmarks.distillation": "distillation.py::study",
    "python -m benchmarks.from_wheel benchmarks.speed": (
        "from_wheel.py::test_a_benchmark_runs_from_a_wheel"
    ),
    "python -m benchmarks.gpu": (
        "gpu.py::test_one_command_leaves_every_part_and_goes_on_where_it_stopped"
    ),
    "cp -r runs/gpu/* benchmarks/ && python -m benchmarks.gpu --report": (
        "gpu.py::test_one_command_leaves_every_part_and_goes_on_where_it_stopped"
    ),
    "python -m benchmarks.plain_pytorch": "plain_pytorch_training.py::test_smoke",
    "python -m benchmarks.quality.cost": "quality.py::test_the_page_has_tables_and_pictures",
    "python -m benchmarks.quality.report": "quality.py::test_the_page_says_what_is_not_run",
    "python -m benchmarks.quality --data": "quality.py::test_the_command_runs_what_is_missing",
    "python -m benchmarks.speed": "speed.py::test_goals_name_rows_that_exist",
    # Each as it stands is parsed there; runs of every method are in test_stl10_run.py.
    "python -m benchmarks.stl10": ("stl10_settings.py::test_commands_of_the_pages_are_understood"),
    "... run": "stl10_settings.py::test_commands_of_the_pages_are_understood",
}
# The network, where a clone is given to the tests by whoever runs them; and programs that are named.
NOT_RUN = [
    "python -m mvmr_loss.adapters.solo",
    "python -m mvmr_loss.cache fill",
    "git clone https://github.com/vturrisi/solo-learn ../solo-learn && cd ../solo-learn",
    "git checkout 9187ea3",
]


def commands(page):
    """Returns the commands of a page: lines of indented blocks, after a prompt or not; code in text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    text = re.sub(r" *\\\n *", " ", text)
    lines = [line.strip().removeprefix("$ ") for line in re.findall(r"^    .*", text, re.M)]
    found = [line.partition("  #")[0].strip() for line in lines]
    found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return [command for command in found if PROGRAM.match(command)]


def test_no_command_of_the_guides_is_left_out():
    known = {*INSTALLING, *NOT_RUN, *ELSEWHERE, 'pip install ".[solo]"'}
    left_out = [
        command
        for command in (command for guide in GUIDES for command in commands(guide))
        if not (command in known or command.startswith(tuple(OF_GUIDES)) or command.endswith("..."))
    ]
    assert left_out == []


@pytest.mark.parametrize("beginning", OF_GUIDES)
def test_the_guides_commands_are_run_as_they_stand(beginning):
    """Each is in one guide, and its test reads it there or is the example's own."""
    file, _, name = OF_GUIDES[beginning].partition("::")
    text = (ROOT / f"{HOST_TESTS}{file}").read_text()
    assert f"def {name}(" in text
    assert "guides.commands(" in text
    found = [command for guide in GUIDES for command in commands(guide)]
    assert any(command.startswith(beginning) for command in found)


def test_no_command_is_left_out():
    found = {command: page.name for page in PAGES for command in commands(page)}
    known = {*INSTALLING, *CACHING, *ELSEWHERE}
    left_out = {
        command: page
        for command, page in found.items()
        if not (command in known or command.startswith(tuple(OF_BENCHMARKS)))
    }
    assert found
    assert left_out == {}


@pytest.mark.parametrize("beginning", OF_BENCHMARKS)
def test_the_benchmarks_commands_have_a_test(beginning):
    file, _, name = OF_BENCHMARKS[beginning].partition("::")
    assert f"def {name}(" in (ROOT / f"{BENCHMARK_TESTS}{file}").read_text()
    assert any(command.startswith(beginning) for page in PAGES for command in commands(page))


def test_commands_are_found_behind_a_prompt_and_variables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("    $ make a\n    A=1 B=2 make b  # why\n\nor `... make\nc`, not `made d`\n")
    assert commands(page) == ["make a", "A=1 B=2 make b", "... make c"]


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_runs_elsewhere_is_there(command):
    file, _, name = ELSEWHERE[command].partition("::")
    text = (ROOT / file).read_text()
    assert (f"def {name}(" if name.startswith("test_") else name) in text


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone, and an environment that sees the packages of this one but not this project."""
    folder = tmp_path_factory.mktemp("reader")
    listed = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "checkout" / name)
    subprocess.run(["git", "init", "-q"], cwd=folder / "checkout", check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(seen))
    return folder


def as_a_reader(command, folder, venv):
    """Runs a command by a shell in which the environment is active."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_installing_as_the_pages_say(checkout):
    venv = checkout / "venv"
    where = "cd / && python -c 'import mvmr_loss; print(mvmr_loss.__file__)'"
    for command in INSTALLING:
        if command == "pre-commit install":
            shutil.copy(Path(sys.executable).with_name("pre-commit"), venv / "bin")
        as_a_reader(command, checkout / "checkout", venv)
        if command in ("pip install .", "pip install dist/mvmr_loss-*.whl"):
            assert str(venv) in as_a_reader(where, checkout, venv)
            as_a_reader("python -m pip uninstall -y mvmr-loss", checkout, venv)


@pytest.mark.slow
def test_caching_as_the_page_says(tmp_path):
    from PIL import Image
    from skimage import data

    (tmp_path / "FOLDER" / "pictures").mkdir(parents=True)
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(
            tmp_path / "FOLDER" / "pictures" / f"{name}.png"
        )
    outputs = [as_a_reader(command, tmp_path, Path(sys.prefix)) for command in CACHING]
    assert "3" in outputs[-1]


def test_kernels_are_told_as_the_page_says():
    # Where there is no compiler it fails after it has told.
    output = as_a_reader("python -m mvmr_loss || true", ROOT, Path(sys.prefix))
    said = (ROOT / "docs" / "cost.md").read_text().partition("$ python -m mvmr_loss\n")[2]
    kept = [line.split() for line in said.splitlines()[:4]]
    told = [line.split() for line in output.splitlines()[:4]]
    assert told[0][0] == kept[0][0] == "mvmr-loss"
    assert told[0][-3:] == kept[0][-3:] == ["kernels", "for", "CPUs:"]
    assert [line[0] for line in told[1:]] == [line[0] for line in kept[1:]]


@pytest.mark.slow
def test_a_new_seed_is_drawn_and_told():
    command = "MVMR_PROPERTY_SEED=new pytest -m slow tests/property"
    outputs = [
        as_a_reader(f"{command} --collect-only -p no:cacheprovider", ROOT, Path(sys.prefix))
        for _ in range(2)
    ]
    seeds = {re.findall(r"^MVMR_PROPERTY_SEED=(\d+)$", output, re.M)[0] for output in outputs}
    assert len(seeds) == 2
    assert "tests collected" in outputs[0]


@pytest.mark.slow
def test_import_time():
    output = as_a_reader("python -m benchmarks.import_time --runs 5", ROOT, Path(sys.prefix))
    # Of medians of interleaved runs. 1.03 was measured; 1.8 with torch's compiler in it.
    assert 0.9 < float(output.split()[-1]) < 1.2

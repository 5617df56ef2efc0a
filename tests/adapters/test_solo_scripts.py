"""solo-learn's own scripts, in processes of their own, with MV-MR: installed and editable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import guides
from tests.adapters.conftest import ON_CPU, save_photographs

ROOT = Path(__file__).parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]

SMALL = (
    "augmentations=mvmr_32",
    "backbone.name=resnet18",
    "method_kwargs.proj_hidden_dim=64",
    "method_kwargs.proj_output_dim=32",
    "optimizer.batch_size=32",
    "scheduler.warmup_epochs=0",
    "+log_every_n_steps=1",
)


def data(folder: Path, val: bool = True) -> tuple[str, str]:
    return f"data.train_path={folder}/train", f"data.val_path={folder / 'test' if val else 'null'}"


def checkpoint(folder: Path) -> Path:
    (found,) = folder.glob("trained_models/mvmr/*/*.ckpt")
    return found


def scalars(folder: Path) -> dict[str, list[float]]:
    """Returns what Lightning's default logger wrote, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[str, list[float]] = {}
    for run in sorted((folder / "lightning_logs").iterdir()):
        events = EventAccumulator(str(run))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return values


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Installs this package in a folder of its own, normally; returns the environment to use it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("mvmr_loss", "adapters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    return {"PYTHONPATH": str(target)}


def run_as_in_the_guide(
    beginning: str, *overrides: str, solo_learn: Path, cwd: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs the guide's first command that begins so, by a shell, with more arguments."""
    command = guides.commands("solo", f"python {beginning}")[0]
    command = command.replace("python ", f"{sys.executable} ", 1)
    command = command.replace(" main_", f" {solo_learn}/main_", 1)
    return subprocess.run(
        ["bash", "-c", f'{command} "$@"', "bash", *overrides],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "disabled", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def pretrained(
    solo_learn: Path,
    installed: dict[str, str],
    photograph_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Pretrains by an installed package and the guide's command; several tests look at it."""
    cwd = tmp_path_factory.mktemp("pretrained")
    done = run_as_in_the_guide(
        "main_pretrain.py",
        *ON_CPU,
        *SMALL,
        *data(photograph_folder, val=False),
        *("data.dataset=custom", "max_epochs=2"),
        solo_learn=solo_learn,
        cwd=cwd,
        env=installed,
    )
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_main_pretrain_with_the_installed_plugin(
    pretrained: tuple[Path, subprocess.CompletedProcess[str]], solo_learn: Path
) -> None:
    cwd, done = pretrained
    assert done.stderr.count("method 'mvmr' and '+mvmr_regularizer' added by its Hydra plugin") == 1
    assert checkpoint(cwd).name.endswith("ep=1.ckpt")
    saved = json.loads((checkpoint(cwd).parent / "args.json").read_text())
    assert saved["method"] == "mvmr"
    assert saved["method_kwargs"]["preset"] == "features"
    assert "mvmr-loss: results: " in done.stdout
    assert "train_acc1 " in done.stdout
    shown = [line for line in done.stdout.splitlines() if line.startswith("mvmr-loss: epoch ")]
    assert [line.split()[2] for line in shown] == ["0:", "1:"]
    assert all(line.split()[3] == "train_acc1" for line in shown)
    logged = scalars(cwd)
    met = ("scattering", "hog", "local_binary_patterns")
    on_features = [f"{term}/{name}" for term in ("regression", "dependence") for name in met]
    for name in ("mvmr", "identity", *on_features):
        assert len(logged[f"train_{name}_loss_step"]) == 4
    if (solo_learn / ".git").exists():
        status = subprocess.run(
            ["git", "-C", str(solo_learn), "status", "--porcelain"],
            check=True,
            capture_output=True,
            text=True,
        )
        assert status.stdout == ""


def test_main_linear(
    solo_learn: Path,
    installed: dict[str, str],
    pretrained: tuple[Path, subprocess.CompletedProcess[str]],
    photograph_folder: Path,
) -> None:
    done = run_as_in_the_guide(
        "main_linear.py",
        *ON_CPU,
        *data(photograph_folder),
        *("data.dataset=custom", "backbone.name=resnet18"),
        *("optimizer.batch_size=44", "max_epochs=1"),
        solo_learn=solo_learn,
        cwd=pretrained[0],
        env=installed,
    )
    assert done.returncode == 0, done.stderr
    assert "added by its Hydra plugin" in done.stderr
    (accuracy,) = scalars(pretrained[0])["val_acc1"]
    assert 0 <= accuracy <= 100
    assert f"mvmr-loss: results: val_acc1 {accuracy:.4g}, val_acc5 " in done.stdout


def evaluation_arguments(cwd: Path, folder: Path) -> list[str]:
    return [
        "--dataset=custom",
        f"--train_data_path={folder}/train",
        f"--val_data_path={folder}/test",
        "--batch_size=16",
        "--num_workers=0",
        f"--pretrained_checkpoint_dir={checkpoint(cwd).parent}",
    ]


@pytest.mark.slow  # the linear evaluation reads the same checkpoint
def test_main_knn(
    solo_learn: Path,
    installed: dict[str, str],
    pretrained: tuple[Path, subprocess.CompletedProcess[str]],
    photograph_folder: Path,
    tmp_path: Path,
) -> None:
    done = run_as_in_the_guide(
        "-m mvmr_loss.adapters.solo main_knn.py",
        *evaluation_arguments(pretrained[0], photograph_folder),
        "--k=5",
        solo_learn=solo_learn,
        cwd=tmp_path,
        env=installed,
    )
    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith("Result: acc@1=")]
    assert len(results) == 4
    accuracies = [float(line.split("=")[1].split(",")[0]) for line in results]
    # Eleven classes, and even an untrained network tells a galaxy from grass.
    assert min(accuracies) > 20


@pytest.mark.slow  # UMAP compiles itself
def test_main_umap(
    solo_learn: Path,
    installed: dict[str, str],
    pretrained: tuple[Path, subprocess.CompletedProcess[str]],
    photograph_folder: Path,
    tmp_path: Path,
) -> None:
    done = run_as_in_the_guide(
        "-m mvmr_loss.adapters.solo main_umap.py",
        *evaluation_arguments(pretrained[0], photograph_folder),
        solo_learn=solo_learn,
        cwd=tmp_path,
        env=installed,
    )
    assert done.returncode == 0, done.stderr
    for name in ("im100_train_umap.pdf", "im100_val_umap.pdf"):
        assert (tmp_path / name).read_bytes().startswith(b"%PDF")


def test_a_plain_hydra_program_sees_nothing(installed: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            import hydra

            @hydra.main(version_base="1.2", config_path=None)
            def main(cfg):
                print(sorted(m for m in ("torch", "mvmr_loss", "solo") if m in sys.modules))
                print("hydra_plugins.mvmr_loss_solo" in sys.modules, dict(cfg))

            main()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(program), "+x=1", "hydra.run.dir=."],
        cwd=tmp_path,
        env={**os.environ, **installed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\nTrue {'x': 1}\n"
    assert done.stderr == ""


def test_own_configuration_upon_a_shipped_one_and_its_errors(
    run_solo: Run, photograph_folder: Path, tmp_path: Path
) -> None:
    """In an editable installation, by the runner: swapped pipelines are refused in one sentence."""
    (tmp_path / "mine.yaml").write_text(
        textwrap.dedent(
            """
            defaults:
              - mvmr_custom
              - _self_
            augmentations:
              - {rrc: {enabled: True}, crop_size: 32, num_crops: 1}
              - {rrc: {enabled: False}, crop_size: 32, num_crops: 1}
            """
        )
    )
    done = run_solo(
        *("main_pretrain.py", "--config-path", str(tmp_path), "--config-name", "mine"),
        *ON_CPU,
        *data(photograph_folder, val=False),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "added by python -m mvmr_loss.adapters.solo" in done.stderr
    assert (
        "augmentations[0] must be the non-augmented pipeline for method 'mvmr' but has rrc.enabled; "
        "augmentations[1] is: put it first."
    ) in done.stderr


@pytest.mark.slow  # three programs; what each does is tested above, too
def test_a_relative_folder_of_few_classes_with_a_cache(
    run_solo: Run, photograph_folder: Path, tmp_path: Path
) -> None:
    """Images, store and checkpoints by relative paths, from two working directories."""
    for split in ("train", "test"):
        for source in sorted((photograph_folder / split).iterdir())[:3]:
            shutil.copytree(source, tmp_path / "images" / split / source.name)

    def pretrain(cwd: Path, up: str, *options: str) -> str:
        done = run_solo(
            *("main_pretrain.py", "--config-name", "mvmr_custom", *ON_CPU, *SMALL),
            *(f"data.train_path={up}images/train", f"data.val_path={up}images/test"),
            *("optimizer.batch_size=8", "max_epochs=1"),
            *("method_kwargs.representations=[pixels,hog]", f"method_kwargs.cache={up}store"),
            *options,
            cwd=cwd,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "mvmr-loss: results: val_acc1 " in pretrain(
        tmp_path, "", "method_kwargs.fill_cache=True"
    )
    (tmp_path / "elsewhere").mkdir()
    # The same measure with options, by the command line; the store is that of the same images.
    pretrain(
        tmp_path / "elsewhere",
        "../",
        "method_kwargs.dependence_measure={name: distance_correlation, eps: 1e-4}",
    )
    saved = json.loads((checkpoint(tmp_path / "elsewhere").parent / "args.json").read_text())
    assert saved["method_kwargs"]["dependence_measure"]["eps"] == 1e-4

    done = run_solo(
        *("main_linear.py", "--config-name", "mvmr_custom_linear", *ON_CPU),
        *("data.train_path=images/train", "data.val_path=images/test", "max_epochs=1"),
        *("backbone.name=resnet18", "optimizer.batch_size=8"),
        f"pretrained_feature_extractor='{checkpoint(tmp_path).relative_to(tmp_path)}'",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the images have 3 classes, so that acc5 is the accuracy in") == 1
    assert "mvmr-loss: results: val_acc1 " in done.stdout


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "needs solo-learn 1.0.6, but there is none; clone it with `git clone"),
        (["solo/__init__.py", "solo/args/setup.py"], "an older one or another package called solo"),
    ],
    ids=["absent", "PyPI's"],
)
def test_exception_no_solo_learn(content: list[str], match: str, tmp_path: Path) -> None:
    for name in ("main_pretrain.py", *content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    done = subprocess.run(
        [sys.executable, "-m", "mvmr_loss.adapters.solo", str(tmp_path / "main_pretrain.py")],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: mvmr_loss.adapters.solo")
    assert match in done.stderr


def test_the_guides_registration(solo_learn: Path) -> None:
    """In a script of one's own, run in the checkout."""
    (program,) = guides.blocks("solo", "python")
    program += """
from solo.methods import METHODS
from mvmr_loss.adapters.solo import RepresentationRegularized
print("mvmr" in METHODS, issubclass(METHODS["vicreg"], RepresentationRegularized))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=solo_learn, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True True\n"
    assert "'+mvmr_regularizer' added by my script" in done.stderr


def test_exception_no_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mvmr_loss.adapters.solo", "nowhere.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "give a script of a solo-learn checkout" in done.stderr
    assert "but nowhere.py was given" in done.stderr


# ------------------------------------------------------------------------------------ longer runs


@pytest.mark.slow
def test_two_processes_with_gathering_and_small_crops(
    run_solo: Run, photograph_folder: Path, tmp_path: Path
) -> None:
    """In an editable installation; the second process is started by Lightning. Four views."""
    replaced = ("devices", "strategy", "augmentations", "optimizer.batch_size")
    done = run_solo(
        *("main_pretrain.py", "--config-name", "mvmr_custom"),
        *(a for a in (*ON_CPU, *SMALL) if not a.startswith(replaced)),
        *data(photograph_folder, val=False),
        *("devices='2'", "strategy=ddp", "max_epochs=1", "optimizer.batch_size=16"),
        *("augmentations=mvmr_96_multicrop", "method_kwargs.gather_distributed=True"),
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # 88 images: 44 a process, two batches of 16 each; a single process would have five.
    assert len(scalars(tmp_path)["train_mvmr_loss_step"]) == 2
    assert checkpoint(tmp_path).name.endswith("ep=0.ckpt")


@pytest.mark.slow
def test_auto_resume_after_a_kill(
    run_solo: Run, solo_learn: Path, photograph_folder: Path, tmp_path: Path
) -> None:
    arguments = [
        *("--config-name", "mvmr_custom", *ON_CPU, *SMALL),
        *data(photograph_folder, val=False),
        *("precision=bf16-mixed", "+accumulate_grad_batches=2", "max_epochs=3"),
    ]
    with open(tmp_path / "log", "wb") as log:
        first = subprocess.Popen(
            [
                *(sys.executable, "-m", "mvmr_loss.adapters.solo"),
                *(str(solo_learn / "main_pretrain.py"), *arguments),
            ],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
        # solo-learn does not write its checkpoints atomically; the end of the archive comes last.
        pattern = "trained_models/*/*/*ep=0.ckpt"
        while first.poll() is None and not any(map(zipfile.is_zipfile, tmp_path.glob(pattern))):
            time.sleep(0.1)
        first.kill()
        first.wait()
    done = run_solo("main_pretrain.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Resuming from previous checkpoint that matches specifications" in done.stdout
    names = [path.name for path in tmp_path.glob("trained_models/*/*/*.ckpt")]
    assert any(name.endswith("ep=2.ckpt") for name in names)
    # Resumed, and not begun again: the second run has fewer than three epochs.
    second = sorted((tmp_path / "lightning_logs").iterdir())[-1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(second))
    events.Reload()
    assert 0 < len(events.Scalars("train_mvmr_loss_epoch")) < 3
    done = run_solo("main_pretrain.py", *arguments, cwd=tmp_path)
    assert "mvmr-loss: results: none, no epoch was left to train" in done.stdout


@pytest.mark.slow
def test_another_method_with_the_regularizer(
    solo_learn: Path, installed: dict[str, str], photograph_folder: Path, tmp_path: Path
) -> None:
    """solo-learn's own VICReg configuration, plus a few words on the command line."""
    done = run_as_in_the_guide(
        "main_pretrain.py --config-path scripts/pretrain/cifar --config-name vicreg",
        *ON_CPU,
        *data(photograph_folder),
        *("data.dataset=custom", "method_kwargs.proj_hidden_dim=64"),
        *("method_kwargs.proj_output_dim=32", "optimizer.batch_size=44", "optimizer.name=adam"),
        *("optimizer.lr=1e-3", "~optimizer.kwargs", "max_epochs=1", "+log_every_n_steps=1"),
        "mvmr_regularizer.weights={pixels: 1.0, hog: 2.0}",
        solo_learn=solo_learn,
        cwd=tmp_path,
        env=installed,
    )
    assert done.returncode == 0, done.stderr
    assert "mvmr-loss: results: val_acc1 " in done.stdout
    logged = scalars(tmp_path)
    assert logged["train_vicreg_loss_step"]
    assert 0 < logged["train_pixels_loss_step"][0] < 1 < logged["train_vicreg_loss_step"][0]
    assert 0 < logged["train_hog_loss_step"][0] < 2


@pytest.mark.slow
def test_training_raises_the_online_accuracy_on_cifar10(run_solo: Run, tmp_path: Path) -> None:
    archive = ROOT.parent / "shared" / "data" / "cifar10-12k.tar"
    if not archive.is_file():
        pytest.skip(f"no {archive.name} in {archive.parent}")
    with tarfile.open(archive) as tar:
        train = [m for m in tar if m.isfile() and "/train/" in m.name]
        by_class: dict[str, list[tarfile.TarInfo]] = {}
        for member in sorted(train, key=lambda m: m.name):
            by_class.setdefault(Path(member.name).parent.name, []).append(member)
        assert len(by_class) == 10
        chosen = [member for members in by_class.values() for member in members[:128]]
        tar.extractall(tmp_path, chosen, filter="data")
    (images,) = tmp_path.glob("*/train")
    raises_the_online_accuracy(run_solo, images.parent, tmp_path, epochs=6, by=6, to=19)


@pytest.mark.slow
def test_training_raises_the_online_accuracy(run_solo: Run, tmp_path: Path) -> None:
    save_photographs(tmp_path / "images", "train", 64, [(48, 48)])
    raises_the_online_accuracy(run_solo, tmp_path / "images", tmp_path, epochs=3, by=15, to=45)


def raises_the_online_accuracy(
    run_solo: Run, images: Path, cwd: Path, epochs: int, by: float, to: float
) -> None:
    """Trains, and checks the online accuracy in percent, and the loss."""
    done = run_solo(
        *("main_pretrain.py", "--config-name", "mvmr_custom"),
        *ON_CPU,
        *SMALL,
        *data(images, val=False),
        *("optimizer.batch_size=64", "optimizer.lr=4e-3", "optimizer.classifier_lr=4e-3"),
        *("method_kwargs.proj_hidden_dim=256", "method_kwargs.proj_output_dim=256"),
        f"max_epochs={epochs}",
        cwd=cwd,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    logged = scalars(cwd)
    accuracy, loss = logged["train_acc1_epoch"], logged["train_mvmr_loss_epoch"]
    assert len(accuracy) == epochs
    assert accuracy[-1] > accuracy[0] + by
    assert accuracy[-1] > to
    assert loss[-1] < loss[0]

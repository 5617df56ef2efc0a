"""What a user's environment sees: a light import, and the same modules in wheel and sdist."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REQUIRED = os.environ.get("MVMR_LOSS_NATIVE") == "required"
HOSTS = [
    "lightly",
    "solo",
    "hydra",
    "lightning",
    "open_clip",
    "pytorch_lightning",
    "timm",
    "skimage",
    "stable_pretraining",
    "torchdistill",
    "torchmetrics",
    "torchvision",
    "transformers",
]


def test_import_needs_torch_and_kornia_only():
    """Importing the package, from anywhere, brings in no host and no optional dependency."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HOSTS!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import mvmr_loss, mvmr_loss.dependence, mvmr_loss.representations, mvmr_loss.cache
import mvmr_loss.teachers, mvmr_loss.distillation, mvmr_loss.adapters
print(mvmr_loss.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from mvmr_loss import __version__

    assert done.stdout.strip() == __version__


def test_import_does_not_bring_a_compiler_in():
    """torch's takes nearly as long as torch itself, Triton a fifth of it (benchmarks/import_time.py)."""
    code = (
        "import sys, torch, kornia; before = set(sys.modules); import mvmr_loss; "
        "print(*{'torch._dynamo', 'torch._inductor', 'sympy', 'triton'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("adapter", ["solo", "stable_pretraining"])
def test_an_adapter_whose_host_finds_it_imports_no_host(adapter):
    """Their hosts import these two; those that subclass a host's classes import that one alone."""
    code = (
        f"import sys, mvmr_loss.adapters.{adapter}; "
        f"print(*({set(HOSTS)!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names():
    import mvmr_loss
    import mvmr_loss.dependence
    import mvmr_loss.representations

    for module in (mvmr_loss, mvmr_loss.dependence, mvmr_loss.representations):
        for name in module.__all__:
            public = getattr(module, name)
            assert name == "__version__" or public.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize(
    "module", ["mvmr_loss.loss", "mvmr_loss.adapters.lightly", "benchmarks.stl10"]
)
def test_a_deprecation_of_our_own_call_is_an_error(module, category):
    code = "import warnings; warnings.warn('it will go', category)"
    with pytest.raises(category, match="it will go"):
        exec(code, {"__name__": module, "category": category})
    with pytest.warns(category):  # Somebody else's: said, but no error.
        exec(code, {"__name__": "elsewhere", "category": category})


def files_of_the_tree():
    """Returns the files that git knows or would take, or where this is no repository, all there are."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = found.stdout.splitlines()
    if found.returncode != 0:
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [str(path) for path in paths if "__pycache__" not in path.parts]
    return {name for name in names if (ROOT / name).is_file()}


def place_in_wheel(name):
    """Returns where a file of the tree is once it is installed."""
    if name.startswith("adapters/solo/plugin/"):
        return name.removeprefix("adapters/solo/plugin/")
    return f"mvmr_loss/{name}" if name.startswith("adapters/") else name


def test_files_of_the_tree_are_found():
    tree = files_of_the_tree()
    for name in (
        "mvmr_loss/_cpu/gram.cpp",
        "mvmr_loss/py.typed",
        "adapters/solo/configs/mvmr_stl10.yaml",
    ):
        assert name in tree
    assert place_in_wheel("adapters/lightly/method.py") == "mvmr_loss/adapters/lightly/method.py"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    source, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("archives")
    # A copy: what earlier builds left in the tree is not asked.
    for name in files_of_the_tree():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_of_the_package(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
    with tarfile.open(archives[1]) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    tree = files_of_the_tree()
    package = {name for name in tree if name.startswith(("mvmr_loss/", "adapters/"))}
    package = {name for name in package if not name.endswith(".md")}
    assert in_wheel == {place_in_wheel(name) for name in package}
    assert package | {"README.md", "LICENSE", "setup.cfg", "pyproject.toml"} <= in_sdist


SEEN_FROM_OUTSIDE = """
import json, torch, mvmr_loss, mvmr_loss.adapters.solo
generator = torch.Generator().manual_seed(0)
z, v = torch.randn(2, 32, 64, generator=generator)
images = torch.rand(32, 3, 32, 32, generator=generator)
features = mvmr_loss.Representations(["pixels", "scattering", "hog"], sketch_dim=64)(images)
print(json.dumps({
    "places": [module.__file__ for module in (mvmr_loss, mvmr_loss.adapters.solo)],
    "kernels": mvmr_loss.kernels(),
    "loss": mvmr_loss.MVMRLoss()(z, v, features).item(),
}))
"""


@pytest.mark.slow
def test_the_installed_wheel_computes_the_same_with_all_kernels(archives, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (python,) = (tmp_path / "venv").glob("bin/python")
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # Lines of a .pth file that are folders are searched; editable installations in them are not seen.
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    with zipfile.ZipFile(archives[0]) as wheel:
        wheel.extractall(site)
    environment = {**os.environ, "MVMR_LOSS_NATIVE": "1"}
    environment.pop("PYTHONPATH", None)

    def seen(program, folder):
        command = [program, "-c", SEEN_FROM_OUTSIDE]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    installed, here = seen(python, tmp_path), seen(sys.executable, ROOT)
    assert all(place.startswith(str(site)) for place in installed["places"])
    assert not any(place.startswith(str(site)) for place in here["places"])
    if not all(on for _, on, _ in here["kernels"]) and not REQUIRED:
        pytest.skip("the kernels cannot be compiled here")
    assert installed["kernels"] == [[name, True, ""] for name in ("gram", "scattering", "sketch")]
    assert installed["loss"] == here["loss"]
    said = subprocess.run([python, "-m", "mvmr_loss"], capture_output=True, text=True, check=True)
    assert said.stdout.count(" on\n") == 3


def test_what_solo_learn_pins_is_its_own_extras_and_the_tests():
    """Its torchmetrics and setuptools are old: no user of another host shall get them."""
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    extras = dict(config["options.extras_require"])
    core = config["options"]["install_requires"]
    pinned = {name for name, wanted in extras.items() if "<0.12" in wanted or "<81" in wanted}
    assert pinned == {"solo"}
    assert "<" not in core
    assert {name for name, wanted in extras.items() if "%(solo)s" in wanted} == {"tests"}
    assert {name for name, wanted in extras.items() if "%(tests)s" in wanted} == {"dev"}

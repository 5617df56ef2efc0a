"""What a user's environment sees: a light import, and the same modules in wheel and sdist."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTS = [
    "lightly",
    "solo",
    "hydra",
    "lightning",
    "pytorch_lightning",
    "timm",
    "skimage",
    "stable_pretraining",
    "torchdistill",
    "torchmetrics",
    "torchvision",
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
import mvmr_loss, mvmr_loss.dependence, mvmr_loss.representations
print(mvmr_loss.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from mvmr_loss import __version__

    assert done.stdout.strip() == __version__


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


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "mvmr_loss").rglob("*.py")}
    adapters = {str(path.relative_to(ROOT)) for path in (ROOT / "adapters").rglob("*.py")}
    assert "mvmr_loss/py.typed" in in_wheel
    assert "mvmr_loss/_cpu/scattering.cpp" in in_wheel
    assert core <= in_wheel
    assert {f"mvmr_loss/{name}" for name in adapters if "hydra_plugins" not in name} <= in_wheel
    assert core | adapters <= in_sdist

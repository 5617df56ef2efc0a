"""No call in the sources could unpickle objects: read from the sources alone, without torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("mvmr_loss", "adapters", "benchmarks", "examples")
# What unpickles whatever it is given.
MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
HARMLESS = ("pickle.UnpicklingError", "pickle.PicklingError", "pickle.PickleError")
# Whole names, by which they are found under whatever name they were imported.
FORBIDDEN = {
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.export.load"),
    *("numpy.lib.format.read_array", "numpy.DataSource"),
}
# Names of functions and methods of any object.
LOADERS = {
    *("from_pretrained", "load_from_checkpoint", "load_state_dict_from_url", "load_url"),
    *("load_learner", "read_pickle", "read_array", "get_pretrained", "unsafe_load"),
}
# File and call -> why it is safe.
ALLOWED = {
    ("mvmr_loss/teachers/sources/transformers.py", "transformers.AutoModel.from_pretrained"): (
        "weights_only=True, and trust_remote_code only where the options say so: "
        "test_folders_that_libraries_read, test_code_beside_the_weights_is_not_run"
    ),
    (
        "mvmr_loss/teachers/sources/transformers.py",
        "transformers.AutoImageProcessor.from_pretrained",
    ): "it reads JSON, and trust_remote_code only where the options say so",
}


def imported(tree):
    """The names of a file that come from elsewhere -> what they are."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def whole_name(node, names):
    """A dotted name as it would be written with whole modules; "" of other expressions."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = whole_name(node.value, names)
        return f"{before}.{node.attr}" if before else f"?.{node.attr}"
    return ""


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def safe_call(name, node):
    """Whether a call of a reader says that nothing is unpickled; None of other calls."""
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in ("torch.load", "torch.serialization.load"):
        return is_constant(options.get("weights_only"), True)
    if name in ("numpy.load", "np.load"):
        given = options.get("allow_pickle")
        return (
            len(node.args) < 3
            and None not in options
            and (given is None or is_constant(given, False))
        )
    if name in ("yaml.load", "yaml.load_all"):
        given = [*node.args[1:], *(v for k, v in options.items() if k == "Loader")]
        return [ast.unparse(part) for part in given] in (["_PlainLoader"], ["yaml.SafeLoader"])
    if "ckpt_path" in options:  # Lightning's fit, validate, test and predict.
        given = options["ckpt_path"]
        return is_constant(given, None) or is_constant(options.get("weights_only"), True)
    return None


def faults_of(source, file="it.py"):
    """What in a source could unpickle: (line, what), and how many calls were judged."""
    tree = ast.parse(source)
    names, called, faults, judged = imported(tree), set(), [], 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            safe = safe_call(whole_name(node.func, names), node)
            if safe is not None:
                called.add(node.func)
                judged += 1
                if not safe:
                    faults.append((node.lineno, ast.unparse(node)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for alias in node.names:
                name = f"{module}.{alias.name}" if module else alias.name
                last = alias.name.split(".")[-1]
                if (name.split(".")[0] in MODULES and name not in HARMLESS) or last in LOADERS:
                    faults.append((node.lineno, ast.unparse(node)))
                if alias.name == "*" and not getattr(node, "level", 0):
                    faults.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name, said = whole_name(node, names), ast.unparse(node)
            last = name.split(".")[-1]
            by_name = name in FORBIDDEN or (last in LOADERS and isinstance(node, ast.Attribute))
            if by_name or (isinstance(node, ast.Name) and node.id in LOADERS):
                judged += 1
                if (file, said) not in ALLOWED:
                    faults.append((node.lineno, said))
            # Given to something else, which calls it as it likes.
            readers = ("torch.load", "torch.serialization.load", "numpy.load", "yaml.load")
            if name in readers and node not in called and isinstance(node.ctx, ast.Load):
                faults.append((node.lineno, said))
        elif isinstance(node, ast.Constant) and node.value in LOADERS:
            faults.append((node.lineno, repr(node.value)))  # For getattr.
    return faults, judged


def files():
    return [path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))]


def test_no_call_could_unpickle():
    told, judged = [], 0
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        faults, count = faults_of(path.read_text(), name)
        told += [f"{name}:{line}: {what}" for line, what in faults]
        judged += count
    assert not told
    assert judged >= 6  # torch.load, yaml.load, ckpt_path, and transformers' three.


def test_what_is_allowed_is_there():
    """An entry whose call is gone would allow another one."""
    for name, said in ALLOWED:
        assert f"{said}(" in (ROOT / name).read_text()
    source = (ROOT / "mvmr_loss/teachers/sources/transformers.py").read_text()
    assert source.count("from_pretrained(") == 3


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "from torch.serialization import load\nload(path, map_location='cpu')",
        "import torch\nlist(map(torch.load, paths))",
        "import torch\nread = torch.load",
        "from torch import load\nlist(map(load, paths))",
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "from pickle import loads as l",
        "from joblib import load",
        "def f():\n    from pickle import Unpickler",
        "import torch.hub\ntorch.hub.load('a/b', 'c')",
        "from torch import hub\nhub.load('a/b', 'c')",
        "from torch.hub import load\nload('a/b', 'c')",
        "from torch.hub import load_state_dict_from_url",
        "import torch\ntorch.hub.load_state_dict_from_url(url)",
        "import torch\ntorch.jit.load(path)",
        "import transformers\ntransformers.AutoModel.from_pretrained(name)",
        "Model.from_pretrained(name, use_safetensors=True)",
        "build().from_pretrained(name)",
        "getattr(model, 'from_pretrained')(name)",
        "MVMR.load_from_checkpoint(path)",
        "import pandas as pd\npd.read_pickle(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, None, True)",
        "import numpy as np\nnp.load(path, **options)",
        "from numpy import load\nload(path, allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "trainer.fit(model, ckpt_path=path)",
        "trainer.test(model, ckpt_path=path, weights_only=False)",
        "from pickle import *",
    ],
)
def test_what_could_unpickle_is_found(source):
    assert faults_of(source)[0]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "from torch import load as read\nread(path, weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.load(text, _PlainLoader)",
        "import yaml\nyaml.safe_load(text)",
        "from pickle import UnpicklingError",
        "import json\njson.load(file)",
        "from benchmarks.harness import load\nload(path)",
        "trainer.fit(model, ckpt_path=path, weights_only=True)",
        "trainer.fit(model)",
        "load_checkpoint(network, path)",
    ],
)
def test_what_could_not_is_not(source):
    assert faults_of(source)[0] == []

"""The loading of C++ kernels, and what happens where they cannot be had."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import mvmr_loss
from mvmr_loss import MVMRLoss, Representations, __main__, _cpu
from mvmr_loss._cpu import build, gram, sketch
from mvmr_loss.dependence import pairwise_distances
from mvmr_loss.representations import DCT, folded_sign_sketch, scattering

NAMES = sorted(path.stem for path in Path(mvmr_loss.__file__).parent.rglob("*.cpp"))
by_name = pytest.mark.parametrize("source", NAMES)


def test_sources_are_found():
    assert NAMES == ["gram", "scattering", "sketch"] == list(build._SIGNATURES)


@pytest.mark.usefixtures("kernels_on")
@by_name
def test_a_compiler_is_all_it_needs(source):
    assert build.load_library(source) is not None
    assert mvmr_loss.KernelStatus(source, True, "") in mvmr_loss.kernels()


def compute():
    generator = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, 12, 40, generator=generator)
    images = torch.rand(12, 3, 16, 16, generator=generator)
    return MVMRLoss()(z, v, Representations(["pixels", "scattering"], sketch_dim=64)(images))


@pytest.fixture(scope="module")
def expected():
    """What is computed here, with kernels where they can be had."""
    return compute()


FAILING = f"""{sys.executable} -c 'exit("In some file:\\nfatal error: no such file\\nstopped.")'"""
OFF = [
    ({"CXX": "no-such-compiler"}, r"there is no C\+\+ compiler called no-such-compiler"),
    ({"CXX": "false"}, "false did not compile NAME.cpp: it returned 1"),
    ({"CXX": "true"}, "true did not compile NAME.cpp: it returned 0"),
    ({"CXX": FAILING}, "did not compile NAME.cpp: fatal error: no such file$"),
    ({"CXX": "'"}, "No closing quotation"),
    ({"PATH": ""}, "there is no C\\+\\+ compiler called c\\+\\+ or g\\+\\+ or clang\\+\\+"),
    (
        {"HOME": "/proc/0", "XDG_CACHE_HOME": "/proc/0", "TMPDIR": "/proc/0"},
        "kept in or loaded from no folder",
    ),
]


@pytest.mark.parametrize(("environment", "reason"), OFF, ids=[str(entry[0]) for entry in OFF])
def test_a_kernel_that_is_off_is_said_once_with_the_reason(
    expected, environment, reason, fresh, monkeypatch, caplog
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "TMPDIR" in environment:
        monkeypatch.setattr("tempfile.tempdir", "/proc/0")
    for _ in range(2):
        torch.testing.assert_close(compute(), expected, rtol=1e-4, atol=1e-7)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 3
    for (name, on, why), source in zip(mvmr_loss.kernels(), NAMES, strict=True):
        assert (name, on) == (source, False)
        assert re.search(reason.replace("NAME", name), why), why
        assert sum(f"kernel {name!r}" in text and why in text for text in warned) == 1
    assert not list(fresh.rglob("*.part"))


def test_where_the_user_forbids_them_nothing_is_said(fresh, monkeypatch, caplog):
    monkeypatch.setenv("MVMR_LOSS_NATIVE", "0")
    compute()
    assert not caplog.records
    assert [status.on for status in mvmr_loss.kernels()] == [False] * 3
    assert all("MVMR_LOSS_NATIVE=0" in status.reason for status in mvmr_loss.kernels())
    assert not list(fresh.rglob("*.so"))


def test_where_they_are_required_it_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv("MVMR_LOSS_NATIVE", "required")
    monkeypatch.setenv("CXX", "no-such-compiler")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be used: there is no C"):
            compute()
    assert [status.on for status in mvmr_loss.kernels()] == [False] * 3


def test_another_wish_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv("MVMR_LOSS_NATIVE", "off")
    with pytest.raises(
        ValueError, match="MVMR_LOSS_NATIVE .* must be 0, 1 or required but is 'off'"
    ):
        compute()


def test_ci_requires_them():
    assert "MVMR_LOSS_NATIVE=required" in (Path(__file__).parents[2] / ".ci/run").read_text()


@pytest.mark.usefixtures("kernels_on")
def test_a_shell_is_told_that_they_are_on(capsys):
    assert __main__.main() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"mvmr-loss {mvmr_loss.__version__}, torch {torch.__version__}")
    assert [line.split() for line in lines] == [[name, "on"] for name in NAMES]


@pytest.mark.parametrize(
    ("environment", "code"), [({"CXX": "no-such"}, 1), ({"MVMR_LOSS_NATIVE": "0"}, 0)]
)
def test_a_shell_is_told_why_they_are_off(environment, code, fresh, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert __main__.main() == code
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [[name, "off:"] for name in NAMES]
    assert all(next(iter(environment.values())) in line for line in lines)


@pytest.mark.usefixtures("kernels_on")
class TestCompiler:
    """How the compiler is named, and when it is asked again."""

    def test_has_arguments(self, fresh, compiler, monkeypatch):
        (fresh / "with space").mkdir()
        ccache = fresh / "with space" / "ccache"
        ccache.write_text('#!/bin/sh\nexec "$@"\n')
        ccache.chmod(0o700)
        monkeypatch.setenv("CXX", f"'{ccache}' {compiler.path} -O2 '-DX=a b'")
        assert build._load.__wrapped__("sketch")[1] == ""
        (call,) = compiler.calls
        assert call.startswith("-O2 -DX=a b -std=c++17 ")

    @pytest.mark.parametrize("named", ["", "  "])
    def test_has_a_default(self, fresh, monkeypatch, named):
        monkeypatch.setenv("CXX", named)
        assert build._compiler()[0].endswith("++")

    def test_is_found_on_the_path(self, fresh, compiler, monkeypatch):
        monkeypatch.setenv("PATH", str(compiler.path.parent), prepend=os.pathsep)
        monkeypatch.setenv("CXX", "compiler -O1")
        assert build._compiler() == [str(compiler.path), "-O1"]

    def test_another_one_is_asked_again(self, fresh, compiler, monkeypatch):
        load = build._load.__wrapped__

        def asked():
            before = len(compiler.calls)
            assert load("sketch")[1] == ""
            return len(compiler.calls) - before

        assert (asked(), asked()) == (1, 0)
        compiler.path.write_text(compiler.path.read_text() + "# another version\n")
        assert (asked(), asked()) == (1, 0)
        monkeypatch.setenv("CXX", f"{compiler.path} -O1")
        assert (asked(), asked()) == (1, 0)
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DX"))
        assert (asked(), asked()) == (1, 0)
        monkeypatch.setattr(build, "_processor", lambda: "another processor")
        assert (asked(), asked()) == (1, 0)

    def test_may_take_too_long(self, fresh, compiler, monkeypatch):
        monkeypatch.setattr(build, "_SECONDS", 0.05)
        assert "timed out" in build._load.__wrapped__("sketch")[1]

    def test_may_be_no_program(self, fresh, compiler, monkeypatch):
        compiler.path.write_bytes(b"\0no program")
        assert "cannot be run" in build._load.__wrapped__("sketch")[1]

    def test_may_give_no_library(self, fresh, compiler, monkeypatch):
        """It is no library that is loaded when the compiler is mended."""
        whole = compiler.library.read_bytes()
        compiler.library.write_bytes(bytes(1000))
        assert "invalid ELF header" in build._load.__wrapped__("sketch")[1]
        compiler.library.write_bytes(whole)
        compiler.path.write_text(compiler.path.read_text() + "# mended\n")
        assert build._load.__wrapped__("sketch")[1] == ""


FORKED = """
import torch
from torch.utils.data import DataLoader, Dataset
from mvmr_loss import MVMRLoss, Representations
from mvmr_loss._cpu import gram

class Data(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        images = torch.rand(16, 3, 16, 16, generator=generator)
        z, v = torch.randn(2, 16, 300, generator=generator)
        features = Representations(["scattering", "pixels"], sketch_dim=64)(images)
        return *features.values(), MVMRLoss()(z, v, features)

torch.set_num_threads(2)
gram._WORK_OF_A_THREAD = 1  # so that two threads are started
expected = [Data()[index] for index in range(4)]
loader = DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context="fork")
for found, wanted in zip(loader, expected, strict=True):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
print("equal")
"""


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
def test_a_forked_loader_may_use_kernels_that_were_used_before():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MVMR_LOSS_NATIVE": "required"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]


FORKED_WITH_THREADS = """
import os, sys, time
import torch
from mvmr_loss._cpu import gram

threads, seconds = int(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(2)
gram._WORK_OF_A_THREAD = 1  # so that two threads are started
x = torch.randn(64, 300)
expected = gram.centered_gram(x)
child = os.fork()
if child == 0:
    torch.set_num_threads(threads)
    found = gram.centered_gram(x)
    os._exit(0 if torch.allclose(found, expected, rtol=1e-4, atol=1e-2) else 3)
end = time.monotonic() + seconds
while time.monotonic() < end:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        print("ended", os.waitstatus_to_exitcode(status))
        break
    time.sleep(0.02)
else:
    os.kill(child, 9)
    os.waitpid(child, 0)
    print("waits")
print("libgomp" in open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else "?")
"""


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
@pytest.mark.parametrize(("threads", "seconds"), [(1, 60), (2, 5)])
def test_a_forked_process_of_several_threads_waits_for_ever(threads, seconds):
    """As docs/cost.md says: GNU's OpenMP has lost its threads, others start new ones."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MVMR_LOSS_NATIVE": "required"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED_WITH_THREADS]
    done = subprocess.run(
        [*command, str(threads), str(seconds)],
        **{"env": environment, "capture_output": True, "text": True, "timeout": 300},
        check=False,
    )
    said, of_gnu = done.stdout.split("\n")[:2]
    assert said == ("waits" if threads > 1 and of_gnu == "True" else "ended 0"), done.stderr[-2000:]


def test_runs_where_nothing_is_followed():
    x = torch.rand(2, 3)
    assert _cpu.can_run(x)
    assert not _cpu.can_run(torch.nn.Parameter(x))
    with torch.no_grad():
        assert _cpu.can_run(torch.nn.Parameter(x))
    assert not _cpu.can_run(x.to("meta"))
    seen = []
    torch.func.grad(lambda t: (seen.append(_cpu.can_run(t)), t.sum())[1])(x)
    torch.vmap(lambda t: (seen.append(_cpu.can_run(t)), t.sum())[1])(x)
    with forward_ad.dual_level():
        seen.append(_cpu.can_run(forward_ad.make_dual(x, x)))
    assert seen == [False] * 3


def test_negated_views_are_read_as_what_they_are():
    x = torch.view_as_complex(torch.rand(12, 40, 2)).conj().imag
    assert x.is_neg()
    plain = x.clone()
    torch.testing.assert_close(folded_sign_sketch(x, 8), folded_sign_sketch(plain, 8))
    torch.testing.assert_close(pairwise_distances(x), pairwise_distances(plain))
    images = x.reshape(3, 1, 10, 16)
    torch.testing.assert_close(scattering(images), scattering(plain.reshape(3, 1, 10, 16)))


def test_loss_is_the_same_without_kernels(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(12, 40, generator=generator, requires_grad=True) for _ in range(2))
    images = torch.rand(12, 3, 16, 16, generator=generator)

    def results():
        z.grad = v.grad = None
        names = ["pixels", "scattering", "hog", "local_std", "dct"]
        loss = MVMRLoss()(z, v, Representations(names, sketch_dim=64)(images))
        loss.backward()
        return loss, z.grad, v.grad

    with_kernels = results()
    for module in (gram, sketch):
        monkeypatch.setattr(module, "load_library", lambda name: None)
    module = sys.modules["mvmr_loss.representations.scattering"]  # whose name its function has
    monkeypatch.setattr(module, "_build_kernel", lambda *_: None)
    for actual, expected in zip(with_kernels, results(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


OPS = [
    ("squared_distances", lambda x: (x,)),
    ("squared_distances", lambda x: (x[:, :1].expand(4, 64).contiguous() * 1e20,)),
    ("product_about_mean", lambda x: (x[:, :4], x, torch.ones(()))),
    ("product_about_mean", lambda x: (x[:, :4], x, torch.ones((), dtype=torch.float64) / 2)),
    ("product_about_mean", lambda x: (x[:, :4], x.T.contiguous().T, torch.ones(()))),
    ("scattering", lambda x: (x.reshape(4, 1, 8, 8), 2, 4, 2)),
    ("folded_sign_sketch", lambda x: (x, x[0].sign(), [1, 0, 2], 24)),
    ("hog", lambda x: (x.reshape(4, 1, 8, 8), 4, 4, 2, "L2", "central", "none")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "arguments"), OPS)
def test_ops_tell_a_compiler_the_truth(name, arguments, dtype):
    """Shapes, dtypes and strides without values are those with values; no input is written to."""
    given = arguments(torch.rand(4, 64, dtype=dtype))
    given = tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in given)
    torch.library.opcheck(getattr(torch.ops.mvmr_loss, name).default, given)


def test_compiled_for_a_cpu_it_runs_what_eager_mode_runs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    images = torch.rand(12, 3, 16, 16)
    representations = Representations(["scattering", "hog"], sketch_dim=16)
    z, v = torch.randn(2, 12, 40)
    criterion = MVMRLoss()

    def loss(images, z, v):
        return criterion(z, v, representations(images))

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images, z, v), loss(images, z, v))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    for name, times in {
        "squared_distances": 4,
        "scattering": 1,
        "hog": 1,
        "folded_sign_sketch": 2,
    }.items():
        assert sum(f"mvmr_loss.{name}" in target for target in called) == times


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_compiled_loss_has_the_gradient_of_eager_mode(scale):
    generator = torch.Generator().manual_seed(0)
    z, v, y = (torch.randn(12, 40, generator=generator) for _ in range(3))

    def gradient(loss):
        x = (z * scale).requires_grad_()
        return torch.autograd.grad(loss(x, v * scale, {"y": y}), x)[0].double()

    compiled = torch.compile(MVMRLoss(), fullgraph=True, backend="aot_eager")
    expected = gradient(MVMRLoss())
    assert (gradient(compiled) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtype_and_device_change_nothing(device, default_restored):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, 40, generator=generator, requires_grad=True)
    v = torch.randn(12, 40, generator=generator)
    images = torch.rand(12, 3, 16, 16, generator=generator)
    ready = Representations(["pixels", "dct"], sketch_dim=64)(images)

    def results():
        representations = {**ready, "dct": DCT()(images), "y": folded_sign_sketch(images, 64)}
        loss = MVMRLoss()(z, v, representations)
        return loss, *torch.autograd.grad(loss, z)

    expected = results()
    torch.set_default_dtype(torch.float64)
    with torch.device(device):
        found = results()
    for actual, reference in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert actual.device.type == "cpu"
        assert torch.equal(actual, reference)


@pytest.fixture
def default_restored():
    yield
    torch.set_default_dtype(torch.float32)

"""The loading of C++ kernels, and what happens where there is no compiler."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import mvmr_loss
from mvmr_loss import MVMRLoss, Representations, _cpu
from mvmr_loss._cpu import build, gram, sketch
from mvmr_loss.dependence import pairwise_distances
from mvmr_loss.representations import DCT, folded_sign_sketch, scattering

NAMES = sorted(path.stem for path in Path(mvmr_loss.__file__).parent.rglob("*.cpp"))
LOAD = build.load_library.__wrapped__

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
by_name = pytest.mark.parametrize("source", NAMES)


def test_sources_are_found():
    assert NAMES == ["gram", "scattering", "sketch"]


@needs_compiler
@by_name
def test_a_compiler_is_all_it_needs(source):
    assert build.load_library(source) is not None


@by_name
@pytest.mark.parametrize(
    "environment",
    [{"MVMR_LOSS_NATIVE": "0"}, {"CXX": "no-such-compiler"}, {"CXX": "false"}],
)
def test_does_without(environment, source, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert LOAD(source) is None
    assert not list(tmp_path.rglob("*.so"))


def test_does_without_a_place_to_keep_it(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert LOAD("gram") is None


@pytest.mark.slow
@needs_compiler
@by_name
def test_is_compiled_once(source, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert LOAD(source) is not None
    (library,) = tmp_path.rglob("*.so")
    made = library.stat().st_mtime_ns
    assert LOAD(source) is not None
    assert library.stat().st_mtime_ns == made
    assert [path.name for path in library.parent.iterdir()] == [library.name]


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

    def loss(images, z, v):
        return MVMRLoss()(z, v, representations(images))

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
    torch.set_default_device(device)
    for actual, reference in zip(results(), expected, strict=True):
        assert actual.dtype == torch.float32
        assert actual.device.type == "cpu"
        assert torch.equal(actual, reference)


@pytest.fixture
def default_restored():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)

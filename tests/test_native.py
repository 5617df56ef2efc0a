"""The loading of C++ kernels, and what happens where there is no compiler."""

import shutil
from pathlib import Path

import pytest
import torch

import mvmr_loss
from mvmr_loss import MVMRLoss, Representations, _native
from mvmr_loss.dependence import _gram_cpu
from mvmr_loss.representations import DCT, folded_sign_sketch

SOURCES = sorted(Path(mvmr_loss.__file__).parent.rglob("*_cpu.cpp"))
LOAD = _native.load_library.__wrapped__

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def test_sources_are_found():
    assert {path.name for path in SOURCES} == {
        "gram_cpu.cpp",
        "scattering_cpu.cpp",
        "sketch_cpu.cpp",
    }


@needs_compiler
@by_name
def test_a_compiler_is_all_it_needs(source):
    assert _native.load_library(source) is not None


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
    assert LOAD(SOURCES[0]) is None


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


def test_reads_only_what_is_in_memory_as_float32():
    x = torch.rand(2, 3)
    assert _native.can_read(x)
    assert _native.can_read(torch.nn.Parameter(x))
    assert not _native.can_read(x.double())
    assert not _native.can_read(x.half())
    assert not _native.can_read(x.to("meta"))
    assert not _native.can_read(torch.view_as_complex(torch.rand(3, 2)).conj().imag)


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
    for module in (_native, _gram_cpu):
        monkeypatch.setattr(module, "can_read", lambda x: False)
    for actual, expected in zip(with_kernels, results(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


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

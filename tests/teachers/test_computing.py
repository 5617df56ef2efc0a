"""In which type a teacher computes, how it is compiled, and what it says without a network."""

from __future__ import annotations

import copy
import socket
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mvmr_loss import Teacher, TeacherPreprocessing
from mvmr_loss.backbones import without_head
from mvmr_loss.teachers.sources.downloads import downloading


class Network(nn.Module):
    """A small network with a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 5)
        self.register_buffer("turn", torch.tensor([1j, 2.0], dtype=torch.complex64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(images).mean(dim=(2, 3)))


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computes_in_float32_whatever_the_weights_are(dtype):
    network = Network()
    for part in (network.stem, network.head):
        part.to(dtype)
    expected = copy.deepcopy(network)
    for part in (expected.stem, expected.head):
        part.float()
    teacher = Teacher(network)
    assert network.head.weight.dtype == torch.float32
    assert torch.equal(network.turn, expected.turn)
    assert torch.equal(teacher(IMAGES), expected.eval()(IMAGES))
    assert teacher(IMAGES.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_half_precision_checkpoints_of_transformers(name, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {
        "vit": {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1},
        "resnet": {"embedding_size": 4, "hidden_sizes": [4, 4, 4, 4], "depths": [1, 1, 1, 1]},
    }
    config = transformers.AutoConfig.for_model(name, **small[name])
    network = transformers.AutoModel.from_config(config).eval().to(dtype)
    network.save_pretrained(tmp_path)
    processor = {"vit": "ViTImageProcessor", "resnet": "ConvNextImageProcessor"}[name]
    getattr(transformers, processor)().save_pretrained(tmp_path)
    teacher = Teacher(source="transformers", weights=tmp_path)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = network.float()(pixel_values=teacher.preprocess(IMAGES)).pooler_output
    torch.testing.assert_close(teacher(IMAGES).flatten(1), expected.flatten(1))


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 cannot follow hooks and named tuples"
)
@pytest.mark.parametrize("layer", [None, "stem", "stem.0"])
@pytest.mark.parametrize("preprocessing", [None, TeacherPreprocessing(24, (16, 16))])
def test_compile(layer, preprocessing):
    teacher = Teacher(Network(), layer=layer, preprocessing=preprocessing)
    compiled = torch.compile(teacher, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(IMAGES), teacher(IMAGES))
    assert teacher._output.kept == []


def test_nothing_is_left_by_a_call():
    teacher = Teacher(Network(), layer="stem")
    before = {key: copy.copy(value) for key, value in vars(teacher).items() if key != "_held"}
    teacher(IMAGES)
    assert teacher.output_shape(3, 16, 16) == (6, 4, 4)
    after = vars(teacher)
    assert {*before, "_held"} == set(after)
    assert vars(before["_output"]) == vars(after["_output"])
    unused = Teacher(Network(), layer="stem")
    with pytest.raises(RuntimeError):
        unused(torch.zeros(1, 5, 16, 16))
    assert not unused._output.wanted


def test_layers_of_two_teachers_on_one_network():
    network = Network()
    first, second = Teacher(network, layer="stem.0"), Teacher(network, layer="head")
    assert torch.equal(first(IMAGES), network.stem[0](IMAGES))
    assert torch.equal(second(IMAGES), network(IMAGES))


def test_numpy_numbers():
    class Tokens(nn.Module):
        def forward(self, images):
            return images.flatten(2).transpose(1, 2)

    teacher = Teacher(
        Tokens(),
        token=np.int64(2),
        mean=np.float32([0.5, 0.5, 0.5]),
        std=[np.float32(0.5)] * 3,
        preprocessing={"resize": np.int64(20), "crop": np.int32(16), "mean": np.zeros(3)},
    )
    assert teacher.preprocessing[:3] == (20, (16, 16), (0, 0, 0))
    assert teacher(IMAGES * 2 - 1).shape == (4, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resize": 0}, ValueError, "resize must be at least 1"),
        ({"resize": 2.5}, TypeError, "resize must be an int"),
        ({"crop": [1, 2, 3]}, ValueError, r"crop must be an int or \(height, width\)"),
        ({"std": [0, 1, 1]}, ValueError, "std positive"),
        ({"mean": ["a"] * 3}, TypeError, "mean must be a number"),
        ({"floor_crop": "yes"}, TypeError, "floor_crop must be True or False"),
        ({"flip_channels": 1}, TypeError, "flip_channels must be True or False"),
    ],
)
def test_preprocessing_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        Teacher(Network(), preprocessing=options)


@pytest.mark.parametrize("layer", [None, "stem"])
def test_fake_tensors(layer):
    teacher = Teacher(Network(), layer=layer, preprocessing=TeacherPreprocessing(24, (16, 16)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        features = teacher.extract(mode.from_tensor(IMAGES))
    assert features.shape == teacher(IMAGES).shape


# Without a network.


@pytest.fixture
def offline(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*arguments, **options):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("mvmr_loss.teachers.sources.downloads.getproxies", dict)
    return constants


@pytest.mark.parametrize(
    ("source", "model", "weights"),
    [
        ("timm", "test_resnet", "default"),
        ("torchvision", "shufflenet_v2_x0_5", "DEFAULT"),
        ("open_clip", "RN50", "yfcc15m"),
        ("transformers", None, "nobody/no-such-net"),
    ],
)
def test_offline_it_says_at_once_that_a_file_can_be_given(
    offline, source, model, weights, monkeypatch, tmp_path
):
    pytest.importorskip(source)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    begin = time.monotonic()
    with pytest.raises((ConnectionError, ValueError), match="give a local file as weights"):
        Teacher(source=source, model=model, weights=weights)
    assert time.monotonic() - begin < 20
    assert offline.HF_HUB_OFFLINE is False


def test_other_errors_stay(offline):
    with pytest.raises(ValueError, match="of the file"), downloading("it"):
        raise ValueError("of the file")
    assert offline.HF_HUB_OFFLINE is False


def test_a_name_of_the_hub_as_model():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="name of a network on the hub, .*, belongs in weights"):
        Teacher(source="transformers", model="facebook/dinov2-small", weights=None)


# Backbones.


def test_without_head():
    models = pytest.importorskip("torchvision.models")
    timm = pytest.importorskip("timm")
    for network in (
        models.resnet18(),
        models.mobilenet_v3_small(),
        timm.create_model("test_vit"),
        timm.create_model("test_resnet"),
    ):
        backbone, width = without_head(network)
        assert backbone is network
        assert network.eval()(torch.zeros(1, 3, 160, 160)).shape == (1, width)
    plain = nn.Sequential(nn.Linear(2, 3))
    assert without_head(plain) == (plain, None)

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from benchmarks.common.encoder import SmallResNet
from benchmarks.common.photographs import Photographs
from mvmr_loss import Representations, Teacher, TeacherPreprocessing
from mvmr_loss.cache import CachedRepresentations
from mvmr_loss.teachers import IMAGENET_MEAN, IMAGENET_STD, load_checkpoint

CIFAR_MEAN, CIFAR_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.261)

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TINY_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
TINY_CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}


@pytest.fixture(autouse=True)
def _no_download(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a test must not use the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", refuse)


def pil_images() -> dict[str, Image.Image]:
    """Photographs of several sizes and shapes."""
    dataset = Photographs("test", crops_per_class=1, crop_size=128, tile_size=128)
    cat, retina = dataset[3][0], dataset[9][0]
    return {
        "square": cat,
        "wide": cat.crop((0, 0, 128, 97)),
        "tall": retina.crop((10, 0, 91, 128)),
        "small": cat.crop((40, 40, 72, 72)),
    }


IMAGES = pil_images()


def as_student_sees(image: Image.Image, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> torch.Tensor:
    """What a student's loader gives: a normalised batch of one."""
    return TF.normalize(TF.to_dtype(TF.to_image(image), torch.float32, scale=True), mean, std)[None]


class Own(nn.Module):
    """A network with tokens, dropout and BatchNorm, to tell training mode from evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(images).mean(dim=1))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        return self.stem(images).flatten(2).transpose(1, 2)


class Tokens(Own):
    """Gives its tokens."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokens(images)


@pytest.fixture
def images():
    return torch.stack([as_student_sees(IMAGES["square"])[0, :, i : i + 16, :16] for i in range(4)])


# A network or callable of one's own.


def test_smoke(images):
    network = Own()
    teacher = Teacher(network)
    features = teacher(images)
    assert features.shape == (4, 5)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(features, network.eval()(images))
    assert teacher.output_shape(3, 16, 16) == (5,)


def test_callable_gets_the_images(images):
    seen = []
    teacher = Teacher(lambda x: (seen.append(x), x.mean(dim=(2, 3)))[1])
    assert torch.equal(teacher(images), images.mean(dim=(2, 3)))
    assert torch.equal(seen[0], images)
    assert teacher.output_shape(3, 16, 16) == (3,)


def test_as_a_representation_by_name(images):
    network = Own()
    representations = Representations(["pixels", {"name": "teacher", "module": network}])
    assert torch.equal(representations(images)["teacher"], network(images))
    assert representations.state_dict() == {}


def test_one_image_is_a_batch_of_one(images):
    teacher = Teacher(Own())
    torch.testing.assert_close(teacher(images[0]), teacher(images)[:1])


# Frozen, in eval mode, no part of its owner.


def test_stays_frozen_and_in_eval_mode(images):
    network = Own().train()
    owner = nn.Sequential(Teacher(network), nn.Linear(5, 2))
    expected = owner[0](images)
    for module in (owner, owner[0], network):
        module.train()
        assert torch.equal(owner[0](images), expected)
        assert not network.training
        assert not network.stem[1].training
    assert all(not parameter.requires_grad for parameter in network.parameters())
    assert network.stem[1].num_batches_tracked == 0
    owner(images).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_is_no_part_of_its_owner():
    network = Own()
    owner = nn.Sequential(Teacher(network), nn.Linear(5, 2))
    assert set(owner.state_dict()) == {"1.weight", "1.bias"}
    assert len(list(owner.parameters())) == 2
    assert list(owner[0].buffers()) == []
    assert network not in list(owner.modules())
    before = network.head.weight.clone()
    owner.to(torch.float64).load_state_dict(
        nn.Sequential(nn.Identity(), nn.Linear(5, 2)).state_dict()
    )
    assert torch.equal(network.head.weight, before)
    assert network.head.weight.dtype == torch.float32


def test_copies_give_the_same(images):
    teacher = Teacher(Own(), l2_normalize=True)
    assert torch.equal(copy.deepcopy(teacher)(images), teacher(images))


def test_under_autocast_and_in_slices(images):
    teacher = Teacher(Own())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images), teacher(images.clone()))
        features = teacher(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, torch.cat([teacher(images[:1]), teacher(images[1:])]))


# Type, device, gradient.


def test_bfloat16(images):
    network = Own()
    exact = Teacher(copy.deepcopy(network))(images)
    teacher = Teacher(network, dtype="bfloat16")
    features = teacher(images)
    assert features.dtype == torch.float32
    assert network.head.weight.dtype == torch.bfloat16
    assert torch.equal(features, features.bfloat16().float())
    torch.testing.assert_close(features, exact, rtol=0.05, atol=0.05)


def test_callable_gets_the_type_and_device(images):
    seen = []

    def network(x):
        seen.append((x.dtype, x.device.type))
        return torch.zeros(len(x), 3)

    features = Teacher(network, dtype=torch.float16, device="meta")(images)
    assert seen == [(torch.float16, "meta")]
    assert features.shape == (4, 3)
    assert features.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_device_and_following_the_images(images):
    network = Own()
    expected = Teacher(copy.deepcopy(network))(images)
    features = Teacher(copy.deepcopy(network), device="cuda")(images)
    assert features.device.type == "cpu"
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)
    features = Teacher(network)(images.cuda())
    assert features.device.type == "cuda"
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_differentiable(images):
    images = images.double().requires_grad_()
    assert not Teacher(Own())(images).requires_grad
    features = Teacher(Own(), differentiable=True)(images)
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not Teacher(Own(), differentiable=True)(images).requires_grad


def test_gradient_flows_through_the_preprocessing(images):
    images = images.requires_grad_()
    preprocessing = TeacherPreprocessing(resize=20, crop=(16, 16))
    teacher = Teacher(Own(), preprocessing=preprocessing, differentiable=True)
    (gradient,) = torch.autograd.grad(teacher(images).square().sum(), images)
    assert gradient.abs().sum() > 0


# Layer, token, length.


def test_layer(images):
    network = Own().eval()
    features = Teacher(network, layer="stem.0")(images)
    assert torch.equal(features, network.stem[0](images))
    assert not network.stem[0]._forward_hooks


@pytest.mark.parametrize("token", [None, 0, 3, -1, "cls", "mean"])
def test_token(images, token):
    network = Tokens()
    tokens = network.eval().tokens(images)
    expected = {None: tokens, "cls": tokens[:, 0], "mean": tokens.mean(dim=1)}
    teacher = Teacher(network, token=token)
    assert torch.equal(
        teacher(images), expected[token] if token in expected else tokens[:, int(token)]
    )
    assert teacher.output_shape(3, 16, 16) == tuple(teacher(images).shape[1:])


def test_l2_normalize(images):
    features, unit = Teacher(Tokens())(images), Teacher(Tokens(), l2_normalize=True)(images)
    assert unit.shape == (4, features[0].numel())
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("output", ["tuple", "pooler_output", "image_embeds", "last_hidden_state"])
def test_outputs_of_several_kinds(images, output):
    class Output:
        pass

    tokens = torch.randn(4, 3, 2)

    def network(x):
        if output == "tuple":
            return (tokens[:, 0], "more")
        result = Output()
        setattr(result, output, tokens if output == "last_hidden_state" else tokens[:, 0])
        return result

    assert torch.equal(Teacher(network)(images), tokens[:, 0])


# Every source: a network of random weights, and one from what the test saved.


class Case(NamedTuple):
    """A teacher by name, and what the library itself makes of an image.

    Attributes:
        random: Arguments for random weights.
        saved: Arguments for the weights that the test saved.
        network: From the library's pixels to features, with the saved weights.
        transform: From a PIL image to the library's pixels, a batch of one.
    """

    random: dict[str, Any]
    saved: dict[str, Any]
    network: Callable[[torch.Tensor], torch.Tensor]
    transform: Callable[[Image.Image], torch.Tensor]


def torchvision_case(folder: Path, name: str, head: str) -> Case:
    models = pytest.importorskip("torchvision.models")
    network = models.get_model(name, weights=None)
    torch.save(network.state_dict(), folder / "weights.pth")
    parent, _, attribute = head.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    transform = models.get_model_weights(name).DEFAULT.transforms()
    named = {"source": "torchvision", "model": name}
    return Case(
        named,
        {**named, "weights": folder / "weights.pth"},
        network.eval(),
        lambda image: transform(image)[None],
    )


def timm_case(folder: Path, name: str) -> Case:
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=7)
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, folder / "weights.pth.tar")
    network.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    named = {"source": "timm", "model": name}
    return Case(
        named,
        {**named, "weights": folder / "weights.pth.tar"},
        network.eval(),
        lambda image: transform(image)[None],
    )


def open_clip_case(folder: Path) -> Case:
    open_clip = pytest.importorskip("open_clip")
    (folder / "tiny-test-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-test-clip.json")
    network, _, transform = open_clip.create_model_and_transforms("tiny-test-clip")
    torch.save(network.state_dict(), folder / "weights.pt")
    named = {"source": "open_clip", "model": "tiny-test-clip"}
    return Case(
        named,
        {**named, "weights": folder / "weights.pt"},
        network.eval().encode_image,
        lambda image: transform(image)[None],
    )


def transformers_case(
    folder: Path, name: str, processor_name: str, options: dict[str, Any]
) -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, **options)
    network = transformers.AutoModel.from_config(config).eval()
    network.save_pretrained(folder)
    processor = getattr(transformers, processor_name)()
    processor.save_pretrained(folder)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        if name == "clip":
            output = network.get_image_features(pixel_values=pixels)
            return output if isinstance(output, torch.Tensor) else output.pooler_output
        return network(pixel_values=pixels).pooler_output

    return Case(
        {"source": "transformers", "model": name, "model_options": options},
        {"source": "transformers", "weights": folder},
        features,
        lambda image: processor(image, return_tensors="pt").pixel_values,
    )


def checkpoint_case(folder: Path) -> Case:
    network = SmallResNet((8, 16))
    torch.save(
        {"model": {"backbone." + k: v for k, v in network.state_dict().items()}}, folder / "w.pt"
    )
    named = {
        "source": "checkpoint",
        "model": "benchmarks.common.encoder:SmallResNet",
        "model_options": {"widths": (8, 16)},
    }
    return Case(
        {},
        {**named, "weights": folder / "w.pt"},
        network.eval(),
        lambda image: as_student_sees(image),
    )


CASES = {
    "torchvision, fc": (torchvision_case, "shufflenet_v2_x0_5", "fc"),
    "torchvision, classifier": (torchvision_case, "mobilenet_v3_small", "classifier.3"),
    "timm, ResNet": (timm_case, "test_resnet"),
    "timm, ViT": (timm_case, "test_vit"),
    "open_clip": (open_clip_case,),
    "transformers, ViT": (transformers_case, "vit", "ViTImageProcessor", TINY_VIT),
    "transformers, DINOv2": (transformers_case, "dinov2", "BitImageProcessor", TINY_DINOV2),
    "transformers, ConvNeXt": (
        transformers_case,
        "convnext",
        "ConvNextImageProcessor",
        TINY_CONVNEXT,
    ),
    "transformers, CLIP": (
        transformers_case,
        "clip",
        "CLIPImageProcessor",
        {
            "vision_config": {**TINY_VIT, "patch_size": 32},
            "text_config": TINY_VIT,
            "projection_dim": 16,
        },
    ),
    "checkpoint": (checkpoint_case,),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    build, *arguments = CASES[request.param]
    return build(tmp_path_factory.mktemp("teacher"), *arguments)


def test_saved_weights_give_the_librarys_features(case):
    image = IMAGES["square"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random weights.*")
        teacher = Teacher(**case.saved)
    with torch.no_grad():
        expected = case.network(teacher.preprocess(as_student_sees(image)))
    features = teacher(as_student_sees(image))
    assert features.flatten(1).shape == expected.flatten(1).shape
    torch.testing.assert_close(features.flatten(1), expected.flatten(1), rtol=1e-4, atol=1e-5)
    assert features.std() > 0
    assert teacher.output_shape(3, 128, 128) == tuple(features.shape[1:])


def test_random_weights_are_warned_of(case):
    if not case.random:
        pytest.skip("a file of one's own needs weights")
    with pytest.warns(UserWarning, match="has random weights because weights is None") as record:
        teacher = Teacher(**case.random)
    assert __file__ in [warning.filename for warning in record]
    features = teacher(as_student_sees(IMAGES["square"]))
    assert features.shape == Teacher(**case.saved)(as_student_sees(IMAGES["square"])).shape
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("image", IMAGES)
def test_pixels_are_the_librarys(case, image):
    teacher = Teacher(**case.saved)
    expected = case.transform(IMAGES[image])
    pixels = teacher.preprocess(as_student_sees(IMAGES[image]))
    assert pixels.shape == expected.shape
    std = 1 if teacher.preprocessing is None else max(teacher.preprocessing.std)
    levels = (pixels - expected).abs() * std * 255
    # Pillow rounds to 8 bits between the two directions, too.
    assert levels.max() < 2.01
    assert levels.mean() < 0.3


@pytest.mark.parametrize("image", IMAGES)
def test_pixels_of_another_students_normalisation(case, image):
    """The student's normalisation is undone, whatever it is."""
    if "checkpoint" in case.saved.values():
        pytest.skip("a network of one's own sees what the student sees")
    expected = Teacher(**case.saved).preprocess(as_student_sees(IMAGES[image]))
    teacher = Teacher(**case.saved, mean=CIFAR_MEAN, std=CIFAR_STD)
    pixels = teacher.preprocess(as_student_sees(IMAGES[image], CIFAR_MEAN, CIFAR_STD))
    levels = (pixels - expected).abs() * max(teacher.preprocessing.std) * 255
    # Float rounding tips a resized pixel over to the next 8-bit level, rarely.
    assert levels.max() < 1.2
    assert (levels > 0.01).float().mean() < 0.01


def test_pixels_are_exact_without_resizing(case):
    teacher = Teacher(**case.saved)
    wanted = teacher.preprocessing
    side = 64 if wanted is None else (wanted.resize or 64)
    side = side if isinstance(side, int) else side[0]
    image = IMAGES["square"].resize((side, side))
    pixels = teacher.preprocess(as_student_sees(image))
    torch.testing.assert_close(pixels, case.transform(image), rtol=0, atol=2e-6)


def test_parts_of_a_library_network(case):
    saved = Teacher(**case.saved)
    names = [n for n, m in saved.module.named_modules() if isinstance(m, nn.Conv2d)]
    teacher = Teacher(**case.saved, layer=names[0], l2_normalize=True)
    features = teacher(as_student_sees(IMAGES["square"]))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(1))
    assert teacher.module.training is False


@pytest.mark.parametrize(
    ("case", "layer"),
    [("timm, ViT", "norm"), ("transformers, ViT", "network.layernorm")],
    indirect=["case"],
)
def test_tokens_of_a_library_network(case, layer):
    image = as_student_sees(IMAGES["square"])
    tokens = Teacher(**case.saved, layer=layer)(image)
    assert tokens.ndim == 3
    for token, expected in (("cls", tokens[:, 0]), ("mean", tokens.mean(dim=1)), (2, tokens[:, 2])):
        features = Teacher(**case.saved, layer=layer, token=token)(image)
        torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("case", ["torchvision, fc", "timm, ResNet"], indirect=True)
def test_a_layer_in_the_classifier_keeps_it(case):
    classes = 1000 if case.saved["source"] == "torchvision" else 7
    teacher = Teacher(**case.saved, layer="fc", model_options={"num_classes": classes})
    assert teacher.output_shape(3, 64, 64) == (classes,)


def test_a_pooling_layer_without_weights_is_left_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    network = transformers.ViTModel(transformers.ViTConfig(**TINY_VIT), add_pooling_layer=False)
    network.save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    teacher = Teacher(source="transformers", weights=tmp_path)
    image = as_student_sees(IMAGES["square"])
    with torch.no_grad():
        expected = network.eval()(teacher.preprocess(image)).last_hidden_state[:, 0]
    torch.testing.assert_close(teacher(image), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch_file = pytest.importorskip("safetensors.torch")
    transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = torch_file.load_file(path)
    state.pop("layernorm.weight")
    torch_file.save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack layernorm.weight, so they would be random"):
        Teacher(source="transformers", weights=tmp_path)


def test_a_file_for_a_transformers_network(tmp_path):
    transformers = pytest.importorskip("transformers")
    network = transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)).eval()
    torch.save(network.state_dict(), tmp_path / "vit.pt")
    teacher = Teacher(
        source="transformers", model="vit", model_options=TINY_VIT, weights=tmp_path / "vit.pt"
    )
    image = as_student_sees(IMAGES["square"])
    with torch.no_grad():
        expected = network(teacher.preprocess(image)).pooler_output
    torch.testing.assert_close(teacher(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["open_clip", "transformers, ViT"], indirect=True)
def test_bfloat16_of_a_library_network(case):
    image = as_student_sees(IMAGES["square"])
    exact, rough = (Teacher(**case.saved, dtype=dtype)(image) for dtype in (None, "bfloat16"))
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("case", ["checkpoint", "timm, ResNet"], indirect=True)
def test_through_a_cache(case, tmp_path):
    batch = torch.cat(
        [as_student_sees(IMAGES["square"]), as_student_sees(IMAGES["square"].rotate(90))]
    )
    representations = Representations([{"name": "teacher", **case.saved}])
    cached = CachedRepresentations(representations, tmp_path, num_samples=2, dtype=torch.float32)
    expected = representations(batch)["teacher"].flatten(1)
    cached(batch, [0, 1])
    torch.testing.assert_close(cached(None, [1, 0])["teacher"], expected.flip(0))


# The preprocessing by itself.


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 61), (97, 33), (33, 32)])
@pytest.mark.parametrize("resize", [None, 32, 50, (24, 40)])
@pytest.mark.parametrize("crop", [None, (24, 24), (31, 30), (64, 57)])
def test_preprocessing_is_torchvisions(interpolation, size, resize, crop):
    image = TF.pil_to_tensor(IMAGES["square"].resize(size[::-1]))[None]
    transform = v2.Compose(
        [
            v2.Resize(resize, interpolation=v2.InterpolationMode(interpolation), antialias=True)
            if resize
            else v2.Identity(),
            v2.CenterCrop(crop) if crop else v2.Identity(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CIFAR_MEAN, CIFAR_STD),
        ]
    )
    preprocessing = TeacherPreprocessing(resize, crop, CIFAR_MEAN, CIFAR_STD, interpolation)
    pixels, expected = preprocessing(image.float() / 255), transform(image)
    assert pixels.shape == expected.shape
    levels = (pixels - expected).abs().max() * max(CIFAR_STD) * 255
    assert levels < (2.2 if resize and interpolation != "nearest" else 1e-3)


def test_preprocessing_can_be_given(images):
    teacher = Teacher(lambda x: x, preprocessing={"resize": [20, 24], "crop": 8, "mean": [0, 0, 0]})
    assert teacher.preprocessing == TeacherPreprocessing((20, 24), (8, 8), (0, 0, 0), IMAGENET_STD)
    assert teacher.output_shape(3, 16, 16) == (3, 8, 8)


def test_part_of_the_librarys_preprocessing_can_be_changed():
    options = {"source": "timm", "model": "test_resnet"}
    with pytest.warns(UserWarning, match="random weights"):
        own, changed = Teacher(**options), Teacher(**options, preprocessing={"resize": None})
    assert changed.preprocessing == own.preprocessing._replace(resize=None)


def test_grey_images_become_the_teachers_three_channels():
    grey = torch.rand(2, 1, 8, 8)
    teacher = Teacher(
        lambda x: x, preprocessing={"mean": (0, 0, 0), "std": (1, 1, 1)}, mean=[0.5], std=[0.5]
    )
    pixels = teacher(grey * 2 - 1)
    torch.testing.assert_close(pixels, ((grey * 255).round() / 255).expand(-1, 3, -1, -1))


# Checkpoint files.


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "teacher", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.encoder."])
def test_checkpoint_wherever_the_weights_are(tmp_path, key, prefix):
    saved, loaded = Own(), Own()
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    state["another.weight"] = torch.zeros(1)
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "c.pt")
    load_checkpoint(loaded, tmp_path / "c.pt")
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_checkpoint_with_the_weights_twice(tmp_path):
    saved = {"student.": Own(), "target.": Own()}
    state = {p + n: v for p, network in saved.items() for n, v in network.state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    loaded = Own()
    with pytest.raises(
        ValueError, match="several times, so prefix must be given: one of student., target."
    ):
        load_checkpoint(loaded, tmp_path / "c.pt")
    load_checkpoint(loaded, tmp_path / "c.pt", prefix="target.")
    assert torch.equal(loaded.head.weight, saved["target."].head.weight)


def test_safetensors(tmp_path):
    torch_file = pytest.importorskip("safetensors.torch")
    saved, loaded = Own(), Own()
    torch_file.save_file(saved.state_dict(), tmp_path / "c.safetensors")
    load_checkpoint(loaded, tmp_path / "c.safetensors")
    assert torch.equal(loaded.head.weight, saved.head.weight)
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_checkpoint(loaded, tmp_path / "c.safetensors")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_damaged_checkpoint(tmp_path, damage):
    torch.save(Own().state_dict(), tmp_path / "c.pt")
    whole = (tmp_path / "c.pt").read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"<html>not found</html>"}
    content["flipped"] = whole[:100] + bytes(255 - byte for byte in whole[100:300]) + whole[300:]
    (tmp_path / "c.pt").write_bytes(content[damage])
    with pytest.raises(ValueError, match="cannot be read as a file of tensors: it is damaged, or"):
        load_checkpoint(Own(), tmp_path / "c.pt")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_objects_are_not_unpickled(tmp_path, save):
    mark = tmp_path / "executed"
    save({"state_dict": Own().state_dict(), "evil": Evil(mark)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds objects that would run code when loaded"):
        load_checkpoint(Own(), tmp_path / "c.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state dict but holds a list"),
        ({"epoch": 3}, "must hold a state dict but holds a dict"),
        (
            {"head.bias": torch.zeros(5)},
            r"must have all weights of the network but lacks stem.0.weight, ",
        ),
        (
            {**Own().state_dict(), "head.weight": torch.zeros(7, 6)},
            r"head.weight has \(7, 6\) there, \(5, 6\) in the network; check the model",
        ),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pt")
    network = Own()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=message):
        load_checkpoint(network, tmp_path / "c.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "either module or source must be given, and not both"),
        ({"module": Own(), "source": "timm"}, ValueError, "either module or source must be given"),
        ({"module": 3}, TypeError, "module must be a torch.nn.Module or a callable but is a int"),
        ({"source": "hub"}, ValueError, "source must be one of torchvision, timm, .* but is 'hub'"),
        ({"source": "timm"}, ValueError, "model must name a network of timm but is None"),
        (
            {"module": Own(), "layer": "stam"},
            ValueError,
            "layer must be the name of a submodule but is 'stam'",
        ),
        ({"module": len, "layer": "stem"}, ValueError, "layer must be None for a callable"),
        ({"module": len, "token": "last"}, ValueError, 'token must be an index, "cls" or "mean"'),
        ({"module": len, "token": 1.5}, TypeError, "token must be an int or a str but is a float"),
        ({"module": len, "token": True}, TypeError, "token must be an int or a str but is a bool"),
        ({"module": len, "dtype": "int8"}, ValueError, "dtype must be a floating-point type"),
        ({"module": len, "dtype": "bf17"}, ValueError, "dtype must be a floating-point type"),
        ({"module": len, "mean": 0.5}, ValueError, "mean must be a list of a number per channel"),
        ({"module": len, "mean": [float("nan")] * 3}, ValueError, "mean must be finite"),
        ({"module": len, "std": [1, 0, 1]}, ValueError, "std positive"),
        ({"module": len, "std": [1, 1]}, ValueError, "mean and std must be of the same length"),
        (
            {"module": len, "preprocessing": {"size": 3}},
            TypeError,
            "preprocessing has no option 'size'",
        ),
        (
            {"module": len, "preprocessing": 3},
            TypeError,
            "preprocessing must be a TeacherPreprocessing",
        ),
        (
            {"module": len, "preprocessing": {"interpolation": "lanczos"}},
            ValueError,
            "interpolation must be among .* but is 'lanczos'",
        ),
    ],
)
def test_exception(options, error, message):
    with pytest.raises(error, match=message):
        Teacher(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("torchvision", "resnet19", None),
            "model must be a network of torchvision but is 'resnet19'",
        ),
        (
            ("torchvision", "resnet18", "V7"),
            "weights of resnet18 must be a file or one of IMAGENET1K_V1",
        ),
        (("timm", "no_such_net", None), "model and weights must be a network of timm"),
        (("timm", "test_vit", "no_such_tag"), "model and weights must be a network of timm"),
        (("open_clip", "ViT-Q-1", None), r"model must be one of open_clip.list_models\(\)"),
        (("open_clip", "ViT-B-16", "tag"), "weights of ViT-B-16 must be a file or one of openai, "),
        (
            ("transformers", "no_such_net", None),
            "model must be a type of network of transformers, such as dinov2",
        ),
        (
            ("transformers", None, "nobody/no-such-net"),
            "weights must be a folder or name on the hub",
        ),
        (("checkpoint", "SmallResNet", None), "model must be 'package.module:function'"),
        (
            ("checkpoint", "benchmarks.common.encoder:SmallResNet", None),
            "weights must be a checkpoint file",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_unknown_model_or_weights(options, message):
    source, model, weights = options
    with pytest.raises(ValueError, match=message):
        Teacher(source=source, model=model, weights=weights)


@pytest.mark.parametrize(
    "source", ["torchvision", "timm", "open_clip", "transformers", "checkpoint"]
)
def test_missing_file(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="weights must be a .*file.* does not exist"):
        Teacher(source=source, model="math:sqrt", weights=tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("no_such_package:build", ValueError, "cannot be imported"),
        ("math:no_such_function", ValueError, "cannot be imported"),
        ("builtins:dict", TypeError, "must build a torch.nn.Module but gave a dict"),
    ],
)
def test_function_that_builds_nothing(tmp_path, model, error, message):
    torch.save(Own().state_dict(), tmp_path / "c.pt")
    with pytest.raises(error, match=message):
        Teacher(source="checkpoint", model=model, weights=tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("source", "module", "package"),
    [
        ("torchvision", "torchvision.models", "torchvision"),
        ("timm", "timm", "timm"),
        ("open_clip", "open_clip", "open_clip_torch"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_missing_library(monkeypatch, source, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"this teacher needs {package}: pip install {package}"):
        Teacher(source=source, model="vit")


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda x: "text", {}, "must give a tensor of features but gave a str"),
        (
            lambda x: x[:2],
            {},
            r"must give features of shape \(4, ...\), a row for each image, but gave",
        ),
        (lambda x: x[:, 0, 0, 0], {}, r"must give features of shape \(4, ...\)"),
        (
            lambda x: x,
            {"token": 0},
            r"token must be None unless the features have shape \(N, T, D\)",
        ),
        (lambda x: x[:, 0], {"token": 16}, "token must be among the 16 tokens but is 16"),
        (Own(), {"layer": "unused"}, "layer must be used by the network but 'unused' is not"),
    ],
)
def test_features_that_do_not_fit(images, network, options, message):
    with pytest.raises(ValueError, match=message):
        Teacher(network, **options)(images)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (255, "normalised with the teacher's arguments mean and std, but undoing"),
        (None, "3 channels"),
    ],
)
def test_images_of_another_normalisation(images, scale, message):
    teacher = Teacher(Own(), preprocessing={})
    wrong = images[:, :2] if scale is None else images * scale
    with pytest.raises(ValueError, match=message):
        teacher(wrong)


def test_images_are_checked(images):
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="images must be finite"):
        Teacher(Own())(images)
    with pytest.raises(TypeError, match="images must have a floating-point dtype"):
        Teacher(Own())((images * 0).int())

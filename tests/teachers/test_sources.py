from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.common.encoder import SmallResNet
from mvmr_loss import Representations, Teacher
from tests.teachers.networks import CIFAR_MEAN, CIFAR_STD, IMAGES, as_student_sees

IMAGE = as_student_sees(IMAGES["square"])
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


def test_a_folder_at_home_for_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vit").mkdir()
    transformers.ViTModel(transformers.ViTConfig(**TINY_VIT)).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "vit")
    monkeypatch.setenv("HOME", str(tmp_path))
    there, home = (Teacher(source="transformers", weights=w) for w in (tmp_path / "vit", "~/vit"))
    assert torch.equal(home(IMAGE), there(IMAGE))


def test_counts_of_batches_may_be_missing_in_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch_file = pytest.importorskip("safetensors.torch")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    transformers.ConvNextImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = torch_file.load_file(path)
    state = {key: value for key, value in state.items() if "num_batches" not in key}
    torch_file.save_file(state, path, metadata={"format": "pt"})
    assert Teacher(source="transformers", weights=tmp_path)(IMAGE).isfinite().all()


def test_open_clip_models_that_bring_their_weights(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "tiny-own-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-own-clip.json")
    brought, other = (open_clip.create_model("tiny-own-clip").eval() for _ in range(2))
    torch.save(brought.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    named = {"source": "open_clip", "model": f"local-dir:{tmp_path}"}
    for weights, network in ((None, brought), (tmp_path / "other.pt", other)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*random weights.*")
            teacher = Teacher(**named, weights=weights)
        with torch.no_grad():
            expected = network.encode_image(teacher.preprocess(IMAGE))
        torch.testing.assert_close(teacher(IMAGE), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be a file or None, .* but are 'laion400m_e32'"):
        Teacher(**named, weights="laion400m_e32")
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        Teacher(**named)


@pytest.mark.parametrize("source", ["open_clip", "timm"])
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_a_model_of_the_hub_without_a_network(source):
    pytest.importorskip(source)
    with pytest.raises(ConnectionError, match="hf-hub:nobody/nothing cannot be downloaded"):
        Teacher(source=source, model="hf-hub:nobody/nothing")


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
    cache = {"path": tmp_path, "dataset": batch, "dtype": "float32"}
    representations = Representations([{"name": "teacher", **case.saved}], cache=cache)
    expected = representations(batch)["teacher"].flatten(1)
    representations(batch, [0, 1])
    torch.testing.assert_close(representations(None, [1, 0])["teacher"], expected.flip(0))

"""Representations by name and from configuration, in slices, and the register function."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from mvmr_loss import Representations, register_representation
from mvmr_loss.representations import HOG, LocalStd, Pixels, Representation
from mvmr_loss.representations import registry as registry_module
from mvmr_loss.representations.collection import _slice_size

FIVE = ["pixels", "augmented_pixels", "scattering", "hog", "local_std"]
ALL = [*FIVE, "patch_scattering", "dct"]
LBP = "local_binary_patterns"


class Unregistered(Pixels):
    """Without a name."""


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))


def test_the_five_of_the_release(images):
    features = Representations(FIVE)(images)
    assert list(features) == FIVE
    for y in features.values():
        assert y.ndim == 2
        assert len(y) == 5
        assert torch.isfinite(y).all()
        assert not y.requires_grad


def test_sizes_at_stl10():
    sizes = Representations([*ALL, LBP]).sizes(3, 96, 96)
    assert sizes == {
        "pixels": 27_648,
        "augmented_pixels": 27_648,
        "scattering": 139_968,
        "hog": 10_368,
        "local_std": 27_648,
        "patch_scattering": 139_968,
        "dct": 27_648,
        "local_binary_patterns": 1_024,
    }
    assert sum(sizes[name] for name in FIVE) == 233_280


@pytest.mark.parametrize(
    ("shape", "error", "match"),
    [
        ((3, 16.0, 16), TypeError, "height must be an int but is a float"),
        ((3, 16, "16"), TypeError, "width must be an int but is a str"),
        ((0, 16, 16), ValueError, "channels must be at least 1 but is 0"),
    ],
)
def test_exception_sizes(shape, error, match):
    with pytest.raises(error, match=f"^{match}"):
        Representations(["hog"]).sizes(*shape)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 40, 33), (4, 64, 48)])
def test_sizes_are_those_computed(shape):
    representations = Representations([*ALL, LBP])
    computed = {k: y.shape[1] for k, y in representations(torch.rand(2, *shape)).items()}
    assert computed == representations.sizes(*shape)


@pytest.mark.parametrize(
    "specification",
    [
        ["pixels", {"name": "hog", "orientations": 9}],
        {"pixels": None, "hog": {"orientations": 9}},
        {"pixels": {}, "hog": HOG(orientations=9)},
        {"pixels": Pixels(), "hog": {"name": "hog", "orientations": 9}},
    ],
)
def test_forms_of_specification(images, specification):
    features = Representations(specification)(images)
    assert list(features) == ["pixels", "hog"]
    torch.testing.assert_close(features["hog"], HOG(orientations=9)(images).flatten(1))


def test_from_yaml(images):
    text = """
    representations:
      pixels:
      hog: {orientations: 9, block_norm: L2}
      coarse: {name: local_std, window_size: 7}
      patch_scattering: {J: 1, L: 4, grid_size: 2}
      augmented_pixels:
        crop_scale: [0.2, 1.0]
        normalization: none
    """
    features = Representations(yaml.safe_load(text)["representations"])(images)
    assert list(features) == ["pixels", "hog", "coarse", "patch_scattering", "augmented_pixels"]
    torch.testing.assert_close(
        features["hog"], HOG(orientations=9, block_norm="L2")(images).flatten(1)
    )
    torch.testing.assert_close(features["coarse"], LocalStd(window_size=7)(images).flatten(1))


def test_labels_let_one_kind_occur_twice(images):
    features = Representations(
        {"fine": {"name": "local_std"}, "coarse": {"name": "local_std", "window_size": 7}}
    )(images)
    torch.testing.assert_close(features["coarse"], LocalStd(window_size=7)(images).flatten(1))
    assert not torch.equal(features["fine"], features["coarse"])


@pytest.mark.parametrize(
    ("device", "shape", "size"),
    [("cpu", (3, 8, 8), 32), ("meta", (3, 32, 32), 2**25 // 3072), ("meta", (3, 1024, 1024), 32)],
)
def test_an_accelerator_works_on_large_slices(device, shape, size):
    assert _slice_size(torch.empty(2, *shape, device=device)) == size


@pytest.mark.parametrize("slice_size", [1, 2, 5, 100])
def test_slices_change_nothing(images, slice_size):
    sliced = Representations(FIVE, slice_size=slice_size)(images)
    whole = Representations(FIVE, slice_size=5)(images)
    for name in FIVE:
        torch.testing.assert_close(sliced[name], whole[name], rtol=1e-5, atol=1e-5)


MEMORY = """
import resource
import sys

import torch

from mvmr_loss import Representations

torch.set_num_threads(1)
representations = Representations(sys.argv[1:])
images = torch.rand(128, 3, 96, 96)
representations(images[:32])


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


before = peak()
features = representations(images)
print(peak() - before, sum(y.nbytes for y in features.values()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak memory so")
def test_memory_is_that_of_the_result():
    # Of 128 images, 120 MB; their second-order fields alone, unsliced, would be 0.5 GB.
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, *FIVE], capture_output=True, text=True, check=True
    ).stdout
    risen, result = (int(number) for number in output.split())
    assert result == 128 * 233_280 * 4
    assert risen < result + 32 * 2**20


@pytest.mark.parametrize("slice_size", [2, 5])
def test_features_share_no_memory_with_the_images(images, slice_size):
    before = images.clone()
    features = Representations(["pixels"], slice_size=slice_size)(images)
    images.zero_()
    assert torch.equal(features["pixels"], before.flatten(1))


def test_single_image_and_memory_format(images):
    representations = Representations(
        ["pixels", "scattering", "patch_scattering", "hog", "local_std", "dct"]
    )
    whole = representations(images)
    other = representations(images.to(memory_format=torch.channels_last))
    single = representations(images[2])
    for name, y in whole.items():
        torch.testing.assert_close(other[name], y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(single[name], y[2:3], rtol=1e-5, atol=1e-5)


def test_gradient_flows_only_on_request(images):
    images = images[:2].requires_grad_()
    names = ["pixels", "scattering", "patch_scattering", "hog", "local_std", "dct"]
    for name, y in Representations(names)(images).items():
        assert not y.requires_grad, name
    for name, y in Representations(names, differentiable=True)(images).items():
        (gradient,) = torch.autograd.grad(y.square().sum(), images)
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


def test_a_class_without_the_option_is_differentiable_as_well(images, own_registry):
    @register_representation("mean_color")
    class MeanColor(Representation):
        def __init__(self, power=1):
            super().__init__()
            self.power = power

        def extract(self, images):
            return images.mean(dim=(-2, -1)) ** self.power

        def output_shape(self, channels, height, width):
            return (channels,)

    images.requires_grad_()
    for options in ({"differentiable": True}, {}):
        found = Representations([{"name": "mean_color", "power": 2, **options}])(images)
        assert found["mean_color"].requires_grad == bool(options)
    assert Representations(["mean_color"], differentiable=True)(images)["mean_color"].requires_grad
    with pytest.raises(TypeError, match="differentiable must be True or False but is 1"):
        Representations([{"name": "mean_color", "differentiable": 1}])
    with pytest.raises(TypeError, match="mean_color has no option 'size'; its options are power"):
        Representations([{"name": "mean_color", "size": 1}])


def test_an_object_states_itself_whether_it_is_differentiable(images):
    with pytest.raises(
        ValueError, match="differentiable must be False, as it is for the object p, but"
    ):
        Representations({"p": Pixels()}, differentiable=True)
    own = Representations({"p": Pixels(differentiable=True)}, differentiable=True)
    assert own(images.requires_grad_())["p"].requires_grad


def test_half_precision_and_autocast(images):
    representations = Representations(["scattering", "patch_scattering", "hog", "local_std", "dct"])
    expected = representations(images.half().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = representations(images.half())
    for name, y in expected.items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name], y)


def test_register(images, own_registry):
    @register_representation("mean_color")
    class MeanColor(Representation):
        def __init__(self, *, gain=1.0, differentiable=False):
            super().__init__(differentiable=differentiable)
            self.gain = gain

        def extract(self, images):
            return self.gain * images.mean(dim=(-2, -1))

        def output_shape(self, channels, height, width):
            return (channels,)

    representations = Representations([{"name": "mean_color", "gain": 2.0}])
    torch.testing.assert_close(representations(images)["mean_color"], 2 * images.mean(dim=(-2, -1)))
    assert representations.sizes(3, 8, 8) == {"mean_color": 3}


def test_numpy_options(images):
    number = np.int64
    modules = Representations(
        {"hog": {"orientations": number(9)}, "pixels": None},
        slice_size=number(2),
        sketch_dim=np.int32(16),
        sketch_seed=np.uint8(3),
    )
    expected = Representations(
        {"hog": {"orientations": 9}, "pixels": None}, slice_size=2, sketch_dim=16, sketch_seed=3
    )
    assert repr(modules) == repr(expected)
    assert modules.sizes(3, 32, 32) == {"hog": 16, "pixels": 16}
    for name, y in expected(images).items():
        assert torch.equal(modules(images)[name], y)


@pytest.mark.parametrize("sketch_dim", [None, 32])
def test_state(images, sketch_dim):
    """Only the count of the random ones is state; a sanity check in inference mode changes nothing."""
    modules = Representations(ALL, sketch_dim=sketch_dim, differentiable=True, normalization="none")
    before = {name: set(vars(module)) for name, module in modules.named_modules()}
    with torch.inference_mode():
        modules.eval()(images)
    modules.train()
    assert {name: set(vars(module)) for name, module in modules.named_modules()} == before
    (count,) = modules.state_dict()
    assert count.startswith("by_name.augmented_pixels.")
    assert count.endswith("samples_drawn")
    copies = [copy.deepcopy(modules), pickle.loads(pickle.dumps(modules)), modules.double()]
    other = Representations(ALL, sketch_dim=sketch_dim, normalization="none")
    other.load_state_dict(copies[0].state_dict())
    expected = other(images)
    for made in copies:
        images = images.detach().requires_grad_()
        features = made(images)
        (gradient,) = torch.autograd.grad(sum(y.sum() for y in features.values()), images)
        assert torch.isfinite(gradient).all()
        for name, y in expected.items():
            torch.testing.assert_close(features[name].detach(), y, rtol=1e-5, atol=1e-5)


class TestException:
    def test_register(self, own_registry):
        with pytest.raises(ValueError, match="'pixels' is already .*Pixels; choose another name"):

            @register_representation("pixels")
            class Other(Pixels):
                pass

        with pytest.raises(TypeError, match="must be a subclass"):
            register_representation("function")(lambda images: images)
        with pytest.raises(ValueError, match="name must be a non-empty string"):
            register_representation("")

    @pytest.mark.parametrize("empty", [[], {}])
    def test_empty(self, empty):
        with pytest.raises(ValueError, match="representations must not be empty"):
            Representations(empty)

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"one of .*hog.*scattering.* but is 'sift'"):
            Representations(["sift"])
        with pytest.raises(
            TypeError, match="hog has no option 'bins'; its options are .*orientations"
        ):
            Representations({"hog": {"bins": 9}})

    @pytest.mark.parametrize("wrong", ["pixels", 3, None])
    def test_form(self, wrong):
        with pytest.raises(TypeError, match="list of names or a mapping"):
            Representations(wrong)

    @pytest.mark.parametrize("wrong", [[3], [{"orientations": 9}], {"hog": 9}])
    def test_item(self, wrong):
        with pytest.raises(TypeError, match="each of representations must be a name"):
            Representations(wrong)

    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            (
                {"t": nn.Flatten()},
                r"but that of 't' is a Flatten; give .* \{'teacher': Teacher\(net",
            ),
            ({"t": len}, r"but that of 't' is a builtin_function_or_method; give a network as"),
            ([nn.Flatten()], r"but one is a Flatten; give a network as \{'teacher': Teacher\("),
            (nn.Flatten(), r"list of names or a mapping .* is a Flatten; give a network as"),
            (Pixels(), r"is a Pixels; give an object under a name: \{'pixels': Pixels\("),
            ([HOG()], r"but one is a HOG; give an object under a name: \{'hog': HOG\("),
            ({"h": HOG}, r"of 'h' is the class HOG; give an object under a name: \{'hog': HOG\("),
            ([Unregistered], r"is the class Unregistered; give .*: \{'name': Unregistered\("),
            (
                {"t": torch.ones(4, 2)},
                "is a Tensor; features that are there already go to the loss",
            ),
            ([np.ones(3), np.ones(3)], "one is a ndarray; features that are there already go"),
            ({"hog": 9}, "but that of 'hog' is 9"),
            ([{"orientations": 9}], "but one is {'orientations': 9}"),
        ],
        ids=str,
    )
    def test_networks_and_features(self, wrong, match):
        with pytest.raises(TypeError, match=match):
            Representations(wrong)

    def test_twice(self):
        with pytest.raises(ValueError, match="'hog' occurs twice; give labels"):
            Representations(["hog", "hog"])

    @pytest.mark.parametrize("label", ["", "a.b", 3, "keys"])
    def test_label(self, label):
        with pytest.raises(ValueError, match="names that are non-empty strings without '.'"):
            Representations({label: {"name": "hog"}})

    def test_slice_size(self):
        with pytest.raises(ValueError, match="slice_size must be at least 1 but is 0"):
            Representations(["pixels"], slice_size=0)
        with pytest.raises(TypeError, match="slice_size must be an int but is a float"):
            Representations(["pixels"], slice_size=8.0)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"sketch_dim": -1}, ValueError, "^sketch_dim must be at least 1 but is -1"),
            ({"sketch_dim": 2.5}, TypeError, "^sketch_dim must be an int but is a float"),
            ({"sketch_dim": 8, "sketch_seed": -1}, ValueError, "^sketch_seed must be at least 0"),
            ({"differentiable": "no"}, TypeError, "^differentiable must be True or False"),
        ],
    )
    def test_options(self, options, error, message):
        with pytest.raises(error, match=message):
            Representations(["pixels"], **options)

    def test_images(self, images):
        representations = Representations(["pixels"])
        with pytest.raises(ValueError, match=r"shape \(N, C, H, W\).*\(32, 32\)"):
            representations(images[0, 0])
        with pytest.raises(TypeError, match=r"images must have a floating-point dtype .*uint8"):
            representations(images.byte())
        with pytest.raises(TypeError, match=r"images must be a torch.Tensor but is a list\."):
            representations([images])
        with pytest.raises(TypeError, match=r"is a ndarray; .*: torch.from_numpy\(images\)\."):
            representations(images.numpy())
        broken = images.clone()
        broken[0, 0, 3, 3] = float("nan")
        with pytest.raises(ValueError, match="images must be finite"):
            representations(broken)
        with pytest.raises(ValueError, match="at least 8 x 8 pixels"):
            Representations(["hog"])(images[..., :7, :7])
        with pytest.raises(ValueError, match="images for hog must be at least 8 x 8 .* are 96 x 7"):
            Representations(["pixels", "hog"]).sizes(3, 96, 7)
        with pytest.raises(ValueError, match="images for hog must be at least 8 x 8 .* are 96 x 7"):
            Representations(["pixels", "hog"], sketch_dim=4).sizes(3, 96, 7)


class Mean(Representation):
    """The mean colour, of a shape that the test sets."""

    shape = (-1, 3)

    def extract(self, images):
        return images.mean(dim=(2, 3)).reshape(self.shape)

    def output_shape(self, channels, height, width):
        return (channels,)


@pytest.mark.parametrize("shape", [(1, 12), (2, 6), (12,), (12, 1)])
def test_a_row_for_each_image(monkeypatch, shape):
    monkeypatch.setattr(Mean, "shape", shape)
    match = r"Mean.extract must return a row for each of 4 images but returned shape \(\d"
    for module in (Mean(), Representations({"mean": Mean()}, normalization="none")):
        with pytest.raises(ValueError, match=match):
            module(torch.rand(4, 3, 5, 5))


def test_a_row_may_be_one_number(monkeypatch):
    monkeypatch.setattr(Mean, "shape", (-1,))
    module = Representations({"mean": Mean()}, normalization="none", slice_size=2)
    images = torch.randn(4, 1, 5, 5)
    torch.testing.assert_close(module(images)["mean"], images.mean(dim=(2, 3)))

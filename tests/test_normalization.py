"""The normalisation: said once, handed to every representation that needs it, and held to."""

import time
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.v2 import functional as TF

from mvmr_loss import Normalization, Representations, register_representation
from mvmr_loss import normalization as normalization_module
from mvmr_loss.representations import AugmentedPixels, Pixels, augmented_pixels
from mvmr_loss.representations import registry as registry_module
from mvmr_loss.representations.sketch import Sketched
from mvmr_loss.teachers import Teacher

NAMES = ["imagenet", "cifar10", "cifar100", "stl10", "none"]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF = Normalization((0.5,) * 3, (0.5,) * 3)
TENTH = Normalization((0.1,) * 3, (1.0,) * 3)


def _teacher():
    """Undoes the normalisation."""
    return Teacher(torch.nn.Flatten(), preprocessing={})


@pytest.fixture
def images():
    """In [0, 1], with dark and light pixels."""
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _never_warned():
    normalization_module._warn_not_normalized.cache_clear()
    yield
    normalization_module._warn_not_normalized.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_names(name, images):
    normalization = Normalization.of(name)
    assert normalization == getattr(Normalization, name)()
    expected = TF.normalize(images, list(normalization.mean), list(normalization.std))
    torch.testing.assert_close(normalization.apply(images), expected)
    torch.testing.assert_close(normalization.undo(expected), images)


def test_imagenet_is_torchvisions():
    from torchvision.models import ResNet18_Weights

    transform = ResNet18_Weights.DEFAULT.transforms()
    assert Normalization.imagenet() == Normalization(transform.mean, transform.std)


@pytest.mark.parametrize(
    "value",
    [
        HALF,
        [[0.5] * 3, [0.5] * 3],
        ((0.5,) * 3, (0.5,) * 3),
        (np.full(3, 0.5, np.float32), np.full(3, 0.5)),
        np.full((2, 3), 0.5),
        (torch.full((3,), 0.5), torch.full((3,), 0.5, dtype=torch.float16)),
        torch.full((2, 3), 0.5),
    ],
    ids=str,
)
def test_forms(value):
    assert Normalization.of(value) == HALF
    assert {type(number) for number in (*Normalization.of(value).mean, *HALF.std)} == {float}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *(
            (value, "normalization must be one of 'imagenet', 'cifar10'.*, a pair .* but is")
            for value in (None, "cifar", "no", 3, [0.5], {"mean": 0, "std": 1}, np.float32(1))
        ),
        ([[0.5], [0.5, 0.5]], "mean and std must have a number for each channel"),
        ([[0.5], [0.0]], r"std must be above 0 but is \(0.0,\)"),
        ([[], []], r"mean must be finite numbers but is \[\]"),
        ([[float("nan")], [1]], "mean must be finite numbers"),
        ([["a"], [1]], "mean must be finite numbers"),
        ([0.5, 0.5], "mean must be finite numbers but is 0.5"),
    ],
    ids=str,
)
def test_exception(value, message):
    with pytest.raises(ValueError, match=message):
        Normalization.of(value)


class TestHandedOn:
    @pytest.fixture(autouse=True)
    def _classes(self, monkeypatch):
        monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))

        @register_representation("as_one")
        class AsOne(Pixels):
            def __init__(self, normalization=None, *, differentiable=False):
                super().__init__(differentiable=differentiable)
                self.stated = normalization

        @register_representation("as_two")
        class AsTwo(Pixels):
            def __init__(self, mean=None, std=None, *, differentiable=False):
                super().__init__(differentiable=differentiable)
                self.stated = Normalization(mean, std)

    @staticmethod
    def stated(module):
        if isinstance(module, AugmentedPixels):
            return module.options.normalization
        if isinstance(module, Teacher):
            return Normalization(module.mean, module.std)
        return module.stated

    CLASSES = pytest.mark.parametrize(
        ("name", "options"),
        [
            ("augmented_pixels", {}),
            ("teacher", {"module": torch.nn.Flatten()}),
            ("as_one", {}),
            ("as_two", {}),
        ],
    )

    @CLASSES
    @pytest.mark.parametrize("stated", [*NAMES, HALF, ((0.5,) * 3, (0.5,) * 3)], ids=str)
    def test_to_all_who_ask(self, name, options, stated):
        modules = Representations(
            {"x": {"name": name, **options}, "pixels": {}}, normalization=stated
        )
        assert (
            self.stated(modules.by_name["x"]) == modules.normalization == Normalization.of(stated)
        )

    @CLASSES
    def test_imagenet_unless_stated(self, name, options):
        modules = Representations({"x": {"name": name, **options}})
        assert self.stated(modules.by_name["x"]) == Normalization.imagenet()

    @CLASSES
    @pytest.mark.parametrize(
        "own",
        [
            {"normalization": TENTH},
            {"normalization": [[0.1] * 3, [1, 1, 1]]},
            {"mean": [0.1] * 3, "std": [1, 1, 1]},
        ],
        ids=str,
    )
    def test_an_option_takes_precedence(self, name, options, own):
        modules = Representations(
            {"x": {"name": name, **options, **own}, "y": {"name": name, **options}},
            normalization="cifar10",
        )
        assert self.stated(modules.by_name["x"]) == TENTH
        assert self.stated(modules.by_name["y"]) == Normalization.cifar10()

    @CLASSES
    @pytest.mark.parametrize(
        "own",
        [{"mean": [0.1] * 3}, {"std": [1, 1, 1]}, {"mean": [0.1] * 3, "normalization": "none"}],
    )
    def test_half_of_it_is_refused(self, name, options, own):
        with pytest.raises(ValueError, match="x must be given normalization, or both mean and std"):
            Representations({"x": {"name": name, **options, **own}})

    OBJECTS = pytest.mark.parametrize(
        "make",
        [
            lambda **own: AugmentedPixels(
                **({"normalization": Normalization(**own)} if own else {})
            ),
            lambda **own: Teacher(torch.nn.Flatten(), preprocessing={}, **own),
            lambda **own: Sketched(Teacher(torch.nn.Flatten(), preprocessing={}, **own), 8),
        ],
        ids=["augmented_pixels", "teacher", "sketched"],
    )

    @OBJECTS
    @pytest.mark.parametrize("cached", [False, True])
    def test_an_object_is_told_without_being_changed(self, make, cached, tmp_path):
        given = make()
        cached = cached and given.cacheable
        cache = {"path": tmp_path / "store", "num_samples": 4} if cached else None
        modules = Representations({"x": given}, normalization=HALF, cache=cache)
        told = modules.by_name["x"]
        if cached:
            told = modules.cache._computed.by_name["x"]
            assert modules.cache._computed.normalization == HALF
        assert told.undone() == HALF
        assert given.undone() == Normalization.imagenet()
        assert Representations({"x": given}).by_name["x"] is given
        assert Representations({"x": given}, normalization=TENTH).by_name["x"].undone() == TENTH

    @OBJECTS
    def test_an_object_that_states_another_is_refused(self, make):
        given = make(mean=(0.5,) * 3, std=(0.5,) * 3)
        for stated in (HALF, None):
            assert Representations({"x": given}, normalization=stated).by_name["x"] is given
        with pytest.raises(ValueError, match=r"normalization must be what x states .*0.5.* but is"):
            Representations({"x": given}, normalization="imagenet")

    def test_an_object_is_told_of_as_many_channels_as_it_takes(self):
        given = Teacher(torch.nn.Flatten(), preprocessing={})
        assert Representations({"x": given}, normalization=([0.5], [0.5])).by_name["x"].mean == (
            0.5,
        )
        with pytest.raises(ValueError, match="mean and std must have 1 or 3 numbers.* but have 2"):
            Representations({"x": given}, normalization=([0.5] * 2, [0.5] * 2))

    def test_an_object_that_undoes_none_stays(self):
        given = Teacher(torch.nn.Flatten())
        assert given.undone() is None
        assert Representations({"x": given}, normalization="none").by_name["x"] is given

    def test_copies_of_an_object_count_as_one(self, images):
        given = AugmentedPixels()
        told = Representations({"x": given}, normalization=HALF)
        told(2 * images - 1)
        assert given.samples_drawn == 4

    def test_an_option_takes_precedence_with_a_cache(self, tmp_path):
        options = {"module": torch.nn.Flatten(), "preprocessing": {}, "normalization": "none"}
        modules = Representations(
            {"teacher": options},
            normalization="cifar10",
            cache={"path": tmp_path, "num_samples": 4},
        )
        assert modules.cache._computed.by_name["teacher"].undone() == Normalization.none()
        assert modules.cache._computed.normalization == Normalization.cifar10()

    @pytest.mark.parametrize("stated", ["none", "cifar10", HALF], ids=str)
    def test_what_a_teacher_sees(self, stated, images):
        seen = []
        teacher = Teacher(
            lambda x: (seen.append(x), x.mean(dim=(2, 3)))[1],
            preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3},
        )
        normalization = Normalization.of(stated)
        Representations({"teacher": teacher}, normalization=stated)(normalization.apply(images))
        torch.testing.assert_close(seen[0], 2 * images - 1, rtol=0, atol=1.1 / 255)

    def test_sketched(self):
        modules = Representations(["augmented_pixels"], normalization=HALF, sketch_dim=8)
        assert self.stated(modules.by_name["augmented_pixels"].representation) == HALF

    def test_who_does_not_ask_refuses_it(self):
        with pytest.raises(TypeError, match="hog has no option 'normalization'"):
            Representations([{"name": "hog", "normalization": "none"}])
        with pytest.raises(ValueError, match="normalization must be one of"):
            Representations(["hog"], normalization="cifar")

    @pytest.mark.parametrize("name", NAMES)
    def test_the_pixels_are_the_same_under_any(self, name, images):
        """The colours are jittered in [0, 1] whatever the normalisation is."""
        normalization = Normalization.of(name)
        modules = Representations(["augmented_pixels"], normalization=name)
        features = modules(normalization.apply(images))["augmented_pixels"].view_as(images)
        expected = augmented_pixels(images, normalization="none")
        torch.testing.assert_close(normalization.undo(features), expected, rtol=0, atol=1e-5)


class TestCheck:
    """Values that cannot come from the stated normalisation are noticed."""

    EXTRACTS = pytest.mark.parametrize(
        "extract",
        [
            augmented_pixels,
            AugmentedPixels(),
            lambda images: Representations(["augmented_pixels"])(images),
            lambda images: Representations({"teacher": _teacher()})(images),
            lambda images: Representations({"teacher": _teacher()}, sketch_dim=8)(images),
        ],
        ids=["function", "module", "collection", "teacher", "sketched"],
    )

    @pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
    def device(self, request):
        return request.param

    def test_a_collection_looks_once_where_it_matters(self, images, device, monkeypatch):
        looked = []
        check = Normalization.check
        monkeypatch.setattr(
            Normalization,
            "check",
            lambda self, x, **how: (looked.append((x.shape, how)), check(self, x, **how)),
        )
        modules = Representations({"teacher": _teacher(), "hog": None}, slice_size=2).to(device)
        images = images.to(device)
        with pytest.warns(UserWarning, match="seem not to be normalised"):
            modules(images)
        modules(images)
        assert looked == [((4, 3, 32, 32), {"wait": True})]
        Representations(["hog", "scattering"])(images)
        assert len(looked) == 1
        wrong = Representations({"teacher": _teacher()}).to(device)
        for _ in range(2):
            with pytest.raises(ValueError, match="images must be normalised with mean"):
                wrong(255 * images)

    def test_a_collection_warns_once_of_several(self, images):
        modules = Representations({"a": _teacher(), "b": _teacher(), "augmented_pixels": None})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            modules(images)
            Representations({"teacher": _teacher()})(images)
        assert len(caught) == 1

    def test_the_image_that_a_store_is_known_by_is_not_warned_of(self, images, tmp_path):
        normalized = Normalization.imagenet().apply(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            modules = Representations(
                {"teacher": _teacher()}, cache={"path": tmp_path, "num_samples": 4}
            )
            modules(normalized, torch.arange(4))
        modules = Representations({"teacher": _teacher()}, cache=tmp_path)
        with (
            pytest.warns(UserWarning, match="seem not to be normalised"),
            pytest.raises(ValueError, match="is not of this image"),
        ):
            modules(images, torch.arange(4))

    def test_a_collection_is_compiled_without_a_look(self, images):
        modules = Representations({"teacher": _teacher()})
        torch.compile(modules, fullgraph=True, backend="eager")(255 * images)
        assert not modules._normalization_is_checked
        with pytest.raises(ValueError, match="images must be normalised"):
            modules(255 * images)

    def test_a_collection_does_not_look_where_it_cannot(self, images):
        modules = Representations({"teacher": _teacher()})
        modules.to("meta")(images.to("meta"))
        with FakeTensorMode():
            modules(torch.empty(2, 3, 8, 8))
        torch.vmap(lambda x: modules(x[None])["teacher"])(images)
        assert not modules._normalization_is_checked

    @NEEDS_GPU
    def test_a_collection_does_not_look_while_a_graph_is_captured(self, images):
        modules, images = Representations({"teacher": _teacher()}), images.cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            modules._check_normalization(255 * images)
        assert not modules._normalization_is_checked

    @EXTRACTS
    @pytest.mark.parametrize("factor", [255, -255, 10])
    def test_out_of_range(self, extract, factor, images):
        with pytest.raises(
            ValueError,
            match=r"images must be normalised with mean \(0.485, .* no value outside of "
            r"\[-6\.5, 7\.08\], but reach from .*; scale them to \[0, 1\] and normalise them",
        ):
            extract(factor * images)

    def test_the_bounds_are_those_of_the_statistics(self, images):
        with pytest.raises(ValueError, match=r"outside of \[-3, 3\]"):
            HALF.check(3.01 * images / images.max())
        for low, high in ((-3.0, 3.0), (-1.0, 1.0)):
            HALF.check(low + (high - low) * images)
        with pytest.raises(ValueError, match=r"outside of \[-1, 2\]"):
            Normalization.none().check(255 * images)
        # Noise and interpolation overshoot.
        Normalization.none().check(2.9 * images - 0.95)

    @EXTRACTS
    def test_images_in_0_1_are_warned_of_once(self, extract, images):
        with pytest.warns(UserWarning, match=r"images seem not to be normalised: .* in \[0, 1\]"):
            extract(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            extract(images)
        with pytest.warns(UserWarning, match="seem not to be normalised"):
            HALF.check(images)

    @pytest.mark.parametrize(
        "make",
        [
            lambda x: Normalization.imagenet().apply(x),
            lambda x: 0.4 * x,  # little contrast: may be a light grey batch
            lambda x: 2 * x,
            lambda x: x - 0.01,
            lambda x: x[:, :1],  # no three channels: no colours, no statistics
        ],
        ids=["normalised", "pale", "brighter", "darker", "grey"],
    )
    def test_others_are_not(self, make, images):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            augmented_pixels(make(images))
            augmented_pixels(images, normalization="none")

    def test_where_values_cannot_be_seen(self, images):
        normalization, wrong = Normalization.imagenet(), 255 * images
        normalization.check(wrong.to("meta"))
        with FakeTensorMode():
            normalization.check(torch.empty(2, 3, 8, 8))
        torch.vmap(lambda x: normalization.check(x[None]) or x)(wrong)

        def checked(x):
            normalization.check(x)
            return x + 1

        torch.compile(checked, fullgraph=True, backend="eager")(wrong)

    def test_a_gradient_is_no_hindrance(self, images):
        with pytest.raises(ValueError, match="images must be normalised"):
            AugmentedPixels(differentiable=True)((255 * images).requires_grad_())

    def test_costs_little(self, images):
        images = Normalization.imagenet().apply(torch.rand(64, 3, 96, 96))
        normalization = Normalization.imagenet()

        def fastest(function):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                function(images)
                times.append(time.perf_counter() - start)
            return min(times)

        assert fastest(normalization.check) < 0.05 * fastest(augmented_pixels)


@pytest.mark.parametrize("way", ["apply", "undo"])
class TestWhatIsNormalised:
    def test_integers_are_refused(self, way):
        images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        with pytest.raises(TypeError, match="images must have a floating-point dtype"):
            getattr(Normalization.imagenet(), way)(images)

    @pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 4, 4)])
    def test_other_shapes_are_refused(self, way, shape):
        with pytest.raises(ValueError, match=r"images must have shape \(N, 3, H, W\).*\(.*4, 4\)"):
            getattr(Normalization.imagenet(), way)(torch.rand(shape))


def test_nothing_is_seen_of_no_images():
    Normalization.imagenet().check(torch.rand(0, 3, 4, 4))

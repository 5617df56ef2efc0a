"""What every representation must do, checked in the same way for all of them.

A file of tests subclasses :class:`RepresentationTester`, states what is in its head, and adds what
is special to the representation: its numbers against another library's.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from mvmr_loss.representations.sketch import Sketched

EAGER = partial(torch.compile, fullgraph=True, backend="aot_eager")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Compilation takes seconds.
SKETCHED_SLOWLY = pytest.mark.parametrize(
    "sketched",
    [pytest.param(False, id="plain"), pytest.param(True, id="sketched", marks=pytest.mark.slow)],
)
SKETCHED = pytest.mark.parametrize("sketched", [False, True], ids=["plain", "sketched"])


# What the first call of a size may be made in, when filters, bases and signs are made and kept.
FIRST_CALLS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "fake": FakeTensorMode,
    "flops": partial(FlopCounterMode, display=False),
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "device": partial(torch.device, "meta"),
    "functorch": nullcontext,
    "compiled": nullcontext,
}


NO_BOOL = ({"differentiable": "no"}, TypeError, "differentiable must be True or False but is 'no'")


class RepresentationTester:
    """The common tests; the attributes are what a subclass states.

    Attributes:
        module: The class.
        function: The function, called as ``function(images, **options)``, if there is one.
        options: All options, with few numbers to compute; some of them not the defaults.
        shapes: Shapes of images for the options.
        wrong: Options that are refused, with the error and its text.
        second_order: Whether a second derivative is to be checked.
        forward_mode: Whether torch has forward-mode derivatives of what it is made of.
        gradient_compiles_from: The first version of torch that compiles its gradient in time.
    """

    module: type
    function = None
    options: dict = {}
    shapes = [(2, 3, 16, 20), (1, 1, 17, 33), (2, 5, 21, 18)]
    small = (1, 2, 8, 9)
    wrong: list = []
    second_order = True
    forward_mode = True
    gradient_compiles_from = (2, 6)

    def pytest_generate_tests(self, metafunc):
        for name, values in {"shape": self.shapes, "refused": [*self.wrong, NO_BOOL]}.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=str)

    def images(self, *shape, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(shape or (4, 3, 16, 20), generator=generator, dtype=dtype) - 0.4

    def make(self, sketched=False, **options):
        """A new module: a random one begins anew."""
        module = self.module(**self.options | options)
        return Sketched(module, 16, seed=2) if sketched else module

    def test_smoke(self, shape):
        images = self.images(*shape)
        features = self.make()(images)
        assert features.shape[0] == shape[0]
        assert torch.isfinite(features).all()
        if self.function is not None:
            torch.testing.assert_close(features, self.function(images, **self.options))
        for name, value in self.options.items():
            if name != "normalization":
                assert f"{name}={value!r}" in repr(self.make())

    @SKETCHED
    def test_cardinality(self, shape, sketched):
        module = self.make(sketched)
        assert module(self.images(*shape)).shape == (shape[0], *module.output_shape(*shape[1:]))

    @SKETCHED
    def test_dtypes(self, sketched):
        images = self.images()
        for dtype in (torch.float16, torch.bfloat16):
            expected = self.make(sketched)(images.to(dtype).float())
            features = self.make(sketched)(images.to(dtype))
            assert features.dtype == torch.float32
            assert torch.equal(features, expected)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(self.make(sketched)(images.to(dtype)), expected)
        expected = self.make(sketched)(images)
        assert expected.dtype == torch.float32
        features = self.make(sketched)(images.double())
        assert features.dtype == torch.float64
        torch.testing.assert_close(features.float(), expected, rtol=1e-4, atol=1e-4)

    @SKETCHED
    def test_strides(self, sketched):
        images = self.images()
        expected = self.make(sketched)(images)
        for other in (
            images.to(memory_format=torch.channels_last),
            images.mT.contiguous().mT,
            images.repeat_interleave(2, dim=-1)[..., ::2],
            images[:1].expand(4, -1, -1, -1),
        ):
            same = expected if other.stride(0) else self.make(sketched)(other.contiguous())
            torch.testing.assert_close(self.make(sketched)(other), same, **CLOSE)

    @SKETCHED
    def test_nan_where_values_are_not_looked_at(self, sketched):
        """As compiled and on an accelerator: an image with NaN or infinities spoils its own row."""
        images, expected = self.images(), self.make(sketched)(self.images())
        for spoilt in (torch.nan, torch.inf):
            images[1, :, ::2] = spoilt
            features = torch.compile(self.make(sketched), backend="eager")(images)
            assert not features[1].isfinite().all()
            torch.testing.assert_close(features[0], expected[0])
            torch.testing.assert_close(features[2:], expected[2:])

    @SKETCHED
    def test_batch_agnostic(self, sketched):
        images = self.images()
        module, whole = self.make(sketched), self.make(sketched)(images)
        parts = [module(part) for part in (images[0], images[1:2], images[2:])]
        torch.testing.assert_close(torch.cat(parts), whole, **CLOSE)

    def test_input_is_left_alone(self):
        images = self.images()
        before = images.clone()
        self.make()(images)
        assert torch.equal(images, before)

    def test_gradcheck(self):
        images = self.images(*self.small, dtype=torch.float64).requires_grad_()

        def features(x):
            return self.make(differentiable=True)(x)

        assert torch.autograd.gradcheck(features, images, eps=1e-7, atol=1e-5)
        if self.second_order:
            assert torch.autograd.gradgradcheck(features, images, eps=1e-7, atol=1e-4, rtol=1e-3)

    @SKETCHED
    def test_gradient_only_on_request(self, sketched):
        images = self.images().requires_grad_()
        assert not self.make(sketched)(images).requires_grad
        module = self.make(sketched, differentiable=True)
        assert module(images).requires_grad
        with torch.no_grad():
            assert module(images).grad_fn is None

    @SKETCHED_SLOWLY
    @pytest.mark.parametrize("differentiable", [False, True])
    def test_compile(self, differentiable, sketched):
        if differentiable and torch.__version__ < self.gradient_compiles_from:
            pytest.skip(f"torch {torch.__version__} takes too long over the gradient's graph")
        images = self.images().requires_grad_(differentiable)
        expected = self.make(sketched, differentiable=differentiable)(images)
        features = EAGER(self.make(sketched, differentiable=differentiable))(images)
        torch.testing.assert_close(features, expected, **CLOSE)
        assert features.requires_grad == differentiable
        if differentiable:
            gradients = [
                torch.autograd.grad(y.square().sum(), images)[0] for y in (features, expected)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    @SKETCHED
    def test_transforms(self, sketched):
        """Derivatives other than plain backward, and many images at once, equal plain backward."""
        x = self.images(3, 3, 16, 20, dtype=torch.float64)
        x[0, :, :10] = 0.3  # flat: where slopes are undefined
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

        def loss(t):
            return self.make(sketched, differentiable=True)(t).square().sum()

        def single(t):
            return self.make(sketched, differentiable=True)(t[None])[0]

        def gradient(function, t):
            t = t.clone().requires_grad_()
            return torch.autograd.grad(function(t), t)[0]

        def loss_of_single(t):
            return single(t).square().sum()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            whole = gradient(loss, x)
            parts = torch.stack([gradient(loss_of_single, t) for t in x])
            expected = torch.stack([single(t) for t in x])
            slope = (whole * direction).sum()
            close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
            close(torch.func.grad(loss)(x), whole)
            close(torch.vmap(single)(x), expected)
            close(torch.vmap(torch.func.grad(loss_of_single))(x), parts)
            close(torch.func.grad(lambda t: torch.vmap(loss_of_single)(t).sum())(x), parts)
            if not self.forward_mode:
                with pytest.raises(NotImplementedError, match="does not support"):
                    torch.func.jvp(loss, (x,), (direction,))
                return
            close(torch.func.jvp(loss, (x,), (direction,))[1], slope)
            for t in (x, x[1:].float()):
                direction = direction[-len(t) :].to(t.dtype)
                slope = (gradient(loss, t) * direction).sum()
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(t, direction)
                    tangent = forward_ad.unpack_dual(loss(dual)).tangent
                torch.testing.assert_close(tangent, slope, rtol=1e-4, atol=1e-4)

    @SKETCHED
    @pytest.mark.parametrize("differentiable", [False, True])
    def test_without_values(self, sketched, differentiable):
        shape = (2, *self.make(sketched).output_shape(3, 16, 20))
        make = partial(self.make, sketched, differentiable=differentiable)
        images = torch.empty(2, 3, 16, 20, device="meta", requires_grad=True)
        features = make().to("meta")(images)
        assert features.shape == shape
        assert features.device.type == "meta"
        with FakeTensorMode():
            images = torch.empty(2, 3, 16, 20, requires_grad=True)
            features = make()(images)
            assert features.shape == shape
            assert features.requires_grad == differentiable
            if differentiable:
                assert torch.autograd.grad(features.sum(), images)[0].shape == images.shape

    @pytest.mark.parametrize(
        ("mode", "sketched"),
        [
            pytest.param(m, s, marks=pytest.mark.slow if s and m == "compiled" else ())
            for m in FIRST_CALLS
            for s in (False, True)
        ],
    )
    def test_first_call(self, mode, sketched):
        """What is kept from a call in any mode serves a gradient; other modes, too, left no trace."""
        # A size of its own: nothing is kept for it yet.
        width = 21 + 2 * list(FIRST_CALLS).index(mode) + sketched
        module, other = (self.make(sketched, differentiable=True) for _ in range(2))
        images = self.images(2, 3, 18, width)
        with FIRST_CALLS[mode]():
            if mode == "functorch":
                torch.func.grad(lambda t: module(t).sum())(images)
            elif mode == "compiled":
                EAGER(module)(images)
            elif mode == "fake":
                self.make(sketched)(torch.empty(images.shape))
                module = other
            else:
                module(images)
        images.requires_grad_()
        for t in (images, images.double()):
            features = module(t)
            assert not features.is_inference()
            (gradient,) = torch.autograd.grad(features.square().sum(), images)
            assert torch.isfinite(gradient).all()
        if self.module.cacheable:
            fresh = self.make(sketched)(images.detach())
            torch.testing.assert_close(fresh, module(images).detach(), **CLOSE)

    @SKETCHED_SLOWLY
    def test_state(self, sketched):
        """A module that was called is copied, pickled, saved, averaged and moved as a new one."""
        images, module = self.images(), self.make(sketched)

        def everything():
            """What each part holds: nothing is made or replaced by a call."""
            return [{**vars(part), "_buffers": dict(part._buffers)} for part in module.modules()]

        keys, before = set(module.state_dict()), everything()
        module(images)
        assert set(module.state_dict()) == keys
        for old, new in zip(before, everything(), strict=True):
            assert set(old) == set(new)
            assert all(old["_buffers"][name] is buffer for name, buffer in new["_buffers"].items())
        assert list(module.parameters()) == []
        assert len(keys) == (0 if module.cacheable else 1)
        loaded = self.make(sketched)
        loaded.load_state_dict(module.state_dict())
        network = nn.ModuleDict({"backbone": nn.Linear(1, 1), "features": module})
        averaged = AveragedModel(network)
        for _ in range(2):
            averaged.update_parameters(network)
        copies = {
            "deepcopy": copy.deepcopy(module),
            "pickle": pickle.loads(pickle.dumps(module)),
            "load_state_dict": loaded,
            "AveragedModel": averaged.module["features"],
            "half": copy.deepcopy(module).half(),
            "double": copy.deepcopy(module).double(),
            "eval": copy.deepcopy(module).eval(),
            "compiled": EAGER(copy.deepcopy(module)),
        }
        expected = module(images)
        for name, other in copies.items():
            features = other(images)
            assert features.dtype == torch.float32, name
            torch.testing.assert_close(features, expected, msg=name, **CLOSE)

    def test_numpy_options(self):
        def numpy(value):
            if isinstance(value, (tuple, list)):
                return np.array(value, dtype=np.float32)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return value
            return np.int64(value) if isinstance(value, int) else np.float32(value)

        options = {name: numpy(value) for name, value in self.options.items()}
        assert repr(self.make(**options)) == repr(self.make())
        images = self.images()
        assert torch.equal(self.make(**options)(images), self.make()(images))
        if self.function is not None:
            assert torch.equal(self.function(images, **options), self.make()(images))

    def test_options_are_the_same_in_function_and_module(self):
        if self.function is not None:
            of_module = dict(signature(self.module).parameters)
            assert "differentiable" in of_module
            of_function = signature(self.function).parameters
            for name in self.options:
                assert of_module[name].default == of_function[name].default
            assert set(of_module) - {"differentiable"} == set(self.options)

    def test_exception(self, refused):
        options, error, message = refused
        with pytest.raises(error, match=message):
            self.module(**options)
        if self.function is not None and refused is not NO_BOOL:
            with pytest.raises(error, match=message):
                self.function(self.images(), **options)

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            ([[1.0]], TypeError, "images must be a torch.Tensor but is a list"),
            (
                torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
                TypeError,
                r"images must have a floating-point dtype but has torch.uint8; .* images in "
                r"0\.\.255 must be divided by 255 and normalised",
            ),
            (torch.zeros(32, 32), ValueError, r"images must have shape \(N, C, H, W\)"),
            (torch.zeros(0, 3, 32, 32), ValueError, "none of them 0"),
            (torch.full((1, 3, 32, 32), float("nan")), ValueError, "images must be finite"),
            (torch.full((1, 3, 32, 32), float("inf")), ValueError, "images must be finite"),
        ],
        ids=["list", "uint8", "two dimensions", "empty", "nan", "inf"],
    )
    def test_wrong_images(self, images, error, message):
        for extract in self.ways():
            with pytest.raises(error, match=message):
                extract(images)

    def test_too_small(self):
        smallest = self.make().minimum_size
        assert self.make(sketched=True).minimum_size == smallest
        for extract in self.ways():
            assert torch.isfinite(extract(self.images(1, 3, smallest, smallest))).all()
            if smallest > 1:
                message = f"at least {smallest} x {smallest} pixels .* are 40 x {smallest - 1}"
                with pytest.raises(ValueError, match=message):
                    extract(self.images(1, 3, 40, smallest - 1))

    def ways(self):
        """The module, its sketch, and the function."""
        ways = [self.make(), self.make(sketched=True)]
        if self.function is not None:
            ways.append(partial(self.function, **self.options))
        return ways

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mvmr_loss import Representations, Teacher, TeacherPreprocessing
from mvmr_loss.teachers import teacher as teacher_module
from tests.teachers.networks import Own, Tokens

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


def test_transforms_go_through_the_preprocessing(images):
    teacher = Teacher(Own(), preprocessing={})
    torch.testing.assert_close(torch.vmap(lambda x: teacher(x[None])[0])(images), teacher(images))


# Layer, token, length.


def test_layer(images):
    network = Own().eval()
    teacher = Teacher(network, layer="stem.0")
    features = teacher(images)
    assert torch.equal(features, network.stem[0](images))
    network(images)
    assert teacher._output.kept == []
    assert torch.equal(copy.deepcopy(teacher)(images), features)
    assert torch.equal(teacher(images), features)


class InPlace(nn.Module):
    """Changes its input, and what its layers give, in place."""

    def __init__(self):
        super().__init__()
        self.norm, self.pair = nn.BatchNorm2d(3), nn.Identity()

    def forward(self, images):
        x = self.norm(images.mul_(2))
        x.relu_()
        return self.pair((x, 1))[0].add_(1).mean(dim=(2, 3))


@pytest.mark.parametrize("as_callable", [False, True])
def test_a_network_may_work_in_place(images, as_callable):
    network, before = InPlace().eval(), images.clone()
    expected = network.norm(2 * images)
    whole = Teacher((lambda x: network(x)) if as_callable else network)
    torch.testing.assert_close(whole(images), expected.relu().add(1).mean(dim=(2, 3)))
    assert torch.equal(Teacher(network, layer="norm")(images), expected)
    assert torch.equal(Teacher(network, layer="pair")(images), expected.relu())
    # The images are the student's too.
    assert torch.equal(images, before)


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


TOKENS = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "output",
    [
        (TOKENS[:, 0], "more"),
        [None, TOKENS[:, 0]],
        {"pooler_output": TOKENS[:, 0]},
        {"image_embeds": TOKENS[:, 0], "last_hidden_state": TOKENS + 1},
        {"pooler_output": TOKENS[:, 0], "last_hidden_state": TOKENS + 1},
        {"last_hidden_state": TOKENS},
    ],
    ids=["tuple", "list", "pooler_output", "image_embeds", "both", "last_hidden_state"],
)
@pytest.mark.parametrize("as_object", [True, False])
def test_outputs_of_several_kinds(images, output, as_object):
    if as_object and isinstance(output, dict):
        output = SimpleNamespace(**output)
    assert torch.equal(Teacher(lambda x: output)(images), TOKENS[:, 0])


@pytest.mark.parametrize("pooled", ["image_embeds", "pooler_output"])
@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_a_token_is_one_of_the_tokens_though_there_are_pooled_features(images, pooled, kind):
    output = kind(**{pooled: TOKENS[:, 0] + 1, "last_hidden_state": TOKENS})
    for token, expected in (("cls", TOKENS[:, 0]), (2, TOKENS[:, 2]), ("mean", TOKENS.mean(1))):
        assert torch.equal(Teacher(lambda x: output, token=token)(images), expected)


# Methods and callables.


@pytest.mark.parametrize("bind", [lambda f: f, functools.partial], ids=["method", "partial"])
@pytest.mark.parametrize("name", ["forward", "tokens"])
def test_a_method_is_of_a_network(images, bind, name):
    network = Own().double()
    teacher = Teacher(bind(getattr(network, name)))
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network.head.weight.dtype == torch.float32
    network.train()
    features = teacher(images)
    assert not network.training
    assert network.stem[1].num_batches_tracked == 0
    assert torch.equal(features, getattr(network, name)(images))
    assert torch.equal(copy.deepcopy(teacher)(images), features)
    assert list(teacher.parameters()) == []
    assert Teacher(bind(network.tokens), layer="stem.0")(images).shape == (4, 6, 4, 4)


def test_a_callable_keeps_no_graph(images):
    network = Own().eval()
    teacher = Teacher(lambda x: network(x.requires_grad_() if x.is_leaf else x))
    features = teacher(images)
    assert features.grad_fn is None
    assert not features.requires_grad


# Tokens and maps in a collection.


@pytest.fixture
def _never_warned():
    teacher_module._warn_of_flattening.cache_clear()
    yield
    teacher_module._warn_of_flattening.cache_clear()


@pytest.mark.usefixtures("_never_warned")
@pytest.mark.parametrize("sketch_dim", [None, 8])
def test_flattened_tokens_are_warned_of_once(images, sketch_dim):
    def run(**options):
        teacher = {"teacher": Teacher(Tokens(), **options)}
        return Representations(teacher, sketch_dim=sketch_dim)(images)["teacher"]

    with pytest.warns(
        UserWarning, match=r"\(N, 16, 6\) are flattened to 96 numbers .* token='cls'"
    ):
        assert run().shape == (4, sketch_dim or 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
        run(token="mean")
        Teacher(Tokens())(images)
        torch.compile(Representations({"t": Teacher(Own(), layer="stem")}), backend="eager")(images)
        Representations({"t": Teacher(nn.AdaptiveAvgPool2d(1))})(images)
    with pytest.warns(
        UserWarning, match=r"\(N, 6, 4, 4\) are flattened to 96 numbers .* pool them"
    ):
        run(layer="stem")

"""On an accelerator, nothing may make the host wait for the device.

It can be told without one: fake CUDA tensors hold no values, so looking at a value raises.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvmr_loss import Representations, Teacher
from mvmr_loss.representations import list_representations

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 14) and not torch.cuda.is_available(),
    reason="torch 2.6 asks the driver for fake CUDA tensors, and there is no GPU; 2.14 does not",
)


class Copies(TorchDispatchMode):
    """Notes tensors that are made of Python's numbers, which would be copied from the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.lift_fresh
        return function(*args, **(kwargs or {}))


def test_a_teachers_statistics_are_not_copied():
    teacher = Teacher(torch.nn.Flatten(), preprocessing={"resize": 20, "crop": 16})
    images = torch.rand(4, 3, 32, 32)
    with Copies() as copies:
        torch.tensor([1.0, 2.0])
        assert copies.count == 1
        teacher(images)
    assert copies.count == 1


@pytest.mark.parametrize("name", list_representations())
@pytest.mark.parametrize("sketch_dim", [None, 16])
def test_representations(name, sketch_dim):
    if name == "teacher":
        pytest.skip("a teacher is made from a network")
    with FakeTensorMode():
        module = Representations([name], sketch_dim=sketch_dim).cuda()
        features = module(torch.empty(4, 3, 32, 32, device="cuda"))[name]
        assert features.device.type == "cuda"
        with pytest.raises(Exception, match="_local_scalar_dense"):
            features.sum().item()

"""On an accelerator, nothing may make the host wait for the device.

It can be told without one: fake CUDA tensors hold no values, so looking at a value raises.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvmr_loss import Representations
from mvmr_loss.representations import list_representations

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 14) and not torch.cuda.is_available(),
    reason="torch 2.6 asks the driver for fake CUDA tensors, and there is no GPU; 2.14 does not",
)


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

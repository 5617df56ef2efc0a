"""On an accelerator, nothing may make the host wait for the device.

It can be told without one: fake CUDA tensors hold no values, so looking at a value raises.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvmr_loss import Representations
from mvmr_loss.representations import FoldedSignSketch

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 14) and not torch.cuda.is_available(),
    reason="torch 2.6 asks the driver for fake CUDA tensors, and there is no GPU; 2.14 does not",
)


@pytest.mark.parametrize("name", ["pixels", "hog", "local_std", "dct"])
def test_representations(name):
    module = Representations([name])
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = module(torch.empty(4, 3, 32, 32, device="cuda"))[name]
        assert features.device.type == "cuda"
        with pytest.raises(Exception, match="_local_scalar_dense"):
            features.sum().item()


def test_sketch():
    sketch = FoldedSignSketch(16)
    sketch(torch.zeros(1, 100))  # The rotations are drawn once, on the CPU.
    with FakeTensorMode():
        sketch.signs = torch.empty(100, device="cuda")
        assert sketch(torch.empty(4, 100, device="cuda")).device.type == "cuda"

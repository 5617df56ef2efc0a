import numpy as np
import pytest
import torch
from torch import nn

from mvmr_loss import MVMRProjectionHead


def test_smoke():
    head = MVMRProjectionHead(16, 24, 32)
    assert head(torch.randn(4, 16)).shape == (4, 32)


def test_default_is_the_papers():
    with torch.device("meta"):
        head = MVMRProjectionHead()
    linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [
        (8192, 2048),
        (8192, 8192),
        (8192, 8192),
    ]
    assert all(layer.bias is None for layer in linear)
    kinds = [type(layer).__name__ for layer in head.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_cardinality(num_layers):
    head = MVMRProjectionHead(8, 6, 5, num_layers=num_layers)
    assert sum(isinstance(layer, nn.Linear) for layer in head.layers) == num_layers
    assert head(torch.randn(3, 8)).shape == (3, 5)


@pytest.mark.parametrize("name", ["input_dim", "hidden_dim", "output_dim", "num_layers"])
def test_exception(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1 but is 0"):
        MVMRProjectionHead(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int but is a float"):
        MVMRProjectionHead(**{name: 2.0})


def test_numpy_options():
    head = MVMRProjectionHead(np.int64(8), np.int32(6), np.int64(5), np.uint8(2))
    assert head(torch.randn(3, 8)).shape == (3, 5)
    assert repr(head) == repr(MVMRProjectionHead(8, 6, 5, 2))

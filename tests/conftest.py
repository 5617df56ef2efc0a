import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _empty_compile_cache():
    """Shared forwards compiled for many modules would otherwise reach dynamo's recompile limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

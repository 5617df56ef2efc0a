import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _empty_compile_cache():
    """Shared forwards compiled for many modules would otherwise reach dynamo's recompile limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _same_number_of_threads():
    """Some commands set torch's threads for their process; here other tests share it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _empty_compile_cache():
    """Shared forwards compiled for many modules would otherwise reach dynamo's recompile limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _same_number_of_threads():
    """Some commands and libraries set the threads of their process; here other tests share it."""
    torch.set_num_threads(_THREADS)
    yield
    torch.set_num_threads(_THREADS)

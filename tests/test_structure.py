"""How much happens in one call: functions entered, launches on an accelerator."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mvmr_loss
from mvmr_loss import MVMRLoss
from mvmr_loss.dependence import distance_correlation

PACKAGE = str(Path(mvmr_loss.__file__).parent)


def entered(function):
    """Returns the functions of the package that a call enters; comprehensions are no functions."""
    found = set()

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name[0] != "<":
            found.add((code.co_filename, code.co_firstlineno, code.co_name))

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def test_few_functions_are_entered():
    # float64: without the kernels.
    z, v, y = torch.randn(3, 16, 8, dtype=torch.float64)
    criterion = MVMRLoss()
    criterion(z, v, {"y": y})
    found = entered(lambda: criterion(z, v, {"y": y}))
    assert 0 < len(found) <= 20, sorted(found)
    assert len({file for file, *_ in found}) <= 5
    found = entered(lambda: distance_correlation(z, v))
    assert 0 < len(found) <= 12, sorted(found)


@pytest.mark.parametrize(("n", "d", "most"), [(16, 8, 28), (256, 512, 30)])
def test_few_functions_are_entered_with_the_kernels(n, d, most):
    if not all(on for _, on, _ in mvmr_loss.kernels()):
        pytest.skip("the kernels cannot be compiled here")
    z, v, y = torch.randn(3, n, d)
    criterion = MVMRLoss()
    criterion(z, v, {"y": y})
    found = entered(lambda: criterion(z, v, {"y": y}))
    assert 0 < len(found) <= most, sorted(found)
    assert len({file for file, *_ in found}) <= 7
    found = entered(lambda: distance_correlation(z, v))
    assert 0 < len(found) <= 20, sorted(found)


class Launches(TorchDispatchMode):
    """Counts what an accelerator would be asked to do: all but views, allocations and questions."""

    FREE = (
        *("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "device"),
        *("split", "unbind", "split_with_sizes", "promote_types", "lift_fresh", "scalar_tensor"),
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not getattr(function, "is_view", False) and name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(
    torch.__version__ < (2, 14) and not torch.cuda.is_available(),
    reason="torch 2.6 aborts in a Function on fake CUDA tensors without a GPU; 2.14 works",
)
def test_few_launches_on_an_accelerator():
    launches = []
    for representations in (5, 6):
        with FakeTensorMode():
            z, v = (torch.empty(256, 2048, device="cuda", requires_grad=True) for _ in range(2))
            ys = {str(i): torch.empty(256, 1024, device="cuda") for i in range(representations)}
            with Launches() as mode:
                MVMRLoss()(z, v, ys)
        launches.append(len(mode.names))
    assert 0 < launches[0] <= 120
    assert launches[1] - launches[0] <= 6

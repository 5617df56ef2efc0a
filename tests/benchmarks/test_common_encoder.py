import pytest

from benchmarks.common.encoder import SmallResNet


@pytest.mark.parametrize("widths", [(), (0, 8), (-8,), (8, 12)])
def test_exception(widths):
    with pytest.raises(ValueError, match=r"widths must be positive multiples of 8 but are \["):
        SmallResNet(widths)

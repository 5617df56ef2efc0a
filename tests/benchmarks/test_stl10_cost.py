"""The estimate of a preset's cost: what is counted, what is measured, and what follows from both."""

import json

import pytest

from benchmarks.stl10 import cost
from benchmarks.stl10.backbones import build_backbone
from benchmarks.stl10.settings import Settings
from benchmarks.stl10.train import flops


def test_operations_of_a_step():
    settings = Settings(
        backbone="small", image_size=32, projector_hidden_dim=16, projector_output_dim=12
    )
    backbone = flops(build_backbone(settings), 32)
    head = 2 * (128 * 16 + 16 * 16 + 16 * 12)
    # Backward, each layer does twice the work of forward; but the images need no gradient.
    stem = 2 * (3 * 3 * 3) * 32 * 16 * 16
    expected = 2 * 4 * (3 * (backbone + head) - stem)
    assert cost.training_flops(settings, batch_size=4) == expected


def test_estimate(tmp_path, capsys):
    path = tmp_path / "cost.json"
    found = cost.main(
        ["--preset", "quick", "--batch-size", "4", "--steps", "1", "--output", str(path)]
    )
    assert json.loads(path.read_text()) == found
    seconds = found["measured"]["seconds"]
    assert set(seconds) == {"augmentation", "representations", "network and loss"}
    assert min(seconds.values()) > 0
    # Incomplete batches are left out.
    images = 4 * (105_000 // 256) * 256
    assert found["images_of_the_pretraining"] == images
    assert found["days_here"] == pytest.approx(images * sum(seconds.values()) / 4 / 86400)
    total = found["counted"]["flops_of_the_pretraining"]
    assert total == images * found["counted"]["flops_per_image"]
    assumed = found["assumed"]
    speed = assumed["gpu_peak_flops_per_second"] * assumed["utilisation"]
    assert found["gpu_hours_assumed"] == pytest.approx(total / speed / 3600)
    assert "assuming 20% of 312 TFLOP/s" in capsys.readouterr().out

from __future__ import annotations

import pytest
import torch

from tests.teachers.networks import IMAGES, as_student_sees


@pytest.fixture(autouse=True)
def _no_download(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a test must not use the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def images():
    return torch.stack([as_student_sees(IMAGES["square"])[0, :, i : i + 16, :16] for i in range(4)])

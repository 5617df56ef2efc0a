"""What frozen features are good for."""

import torch

from benchmarks.common.data import Data
from benchmarks.common.frozen import evaluate_frozen
from benchmarks.plain_pytorch.training import normalize


def test_evaluation_knows_good_features():
    torch.manual_seed(0)
    labels = torch.arange(240) % 4
    images = (labels[:, None, None, None] * 60 + 20).expand(-1, 3, 8, 8).to(torch.uint8).clone()
    data = Data(images, labels, images[:80], labels[:80], list("abcd"))

    def encoder(x):
        # A bump for each brightness, so that a linear classifier can tell them apart.
        return torch.exp(-((x.mean(dim=(1, 2, 3))[:, None] - torch.linspace(-2, 2, 9)) ** 2) * 4)

    found = evaluate_frozen(encoder, data, normalize, photographs=data)
    assert set(found) == {
        *("knn", "linear", "few_labels", "noise", "blur", "contrast", "photographs")
    }
    assert found["linear"] == found["knn"] == found["blur"] == found["photographs"] == 100
    assert found["few_labels"] > 95
    assert found["contrast"] < 100
    few = evaluate_frozen(encoder, data, normalize, damaged=False)
    assert few == {"knn": 100, "linear": 100}
    assert set(found) - set(evaluate_frozen(encoder, data, normalize)) == {"photographs"}

"""The projection head that MV-MR trains with."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from mvmr_loss._checks import check_int


class MVMRProjectionHead(nn.Module):
    """Projection head of MV-MR: linear layers without biases, BatchNorm and ReLU between them.

    The paper's is three layers of 8192, the defaults here.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), section 4.

    Args:
        input_dim: Width of the backbone's features.
        hidden_dim: Width of the hidden layers.
        output_dim: Width of the embeddings.
        num_layers: Number of linear layers, at least 1.

    Examples:
        >>> import torch
        >>> head = MVMRProjectionHead(input_dim=512, hidden_dim=64, output_dim=32)
        >>> head(torch.randn(4, 512)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        input_dim = check_int("input_dim", input_dim, minimum=1)
        hidden_dim = check_int("hidden_dim", hidden_dim, minimum=1)
        output_dim = check_int("output_dim", output_dim, minimum=1)
        num_layers = check_int("num_layers", num_layers, minimum=1)
        widths = [input_dim, *[hidden_dim] * (num_layers - 1)]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [
                nn.Linear(width_in, width_out, bias=False),
                nn.BatchNorm1d(width_out),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], output_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the embeddings (N, output_dim) of a backbone's features (N, input_dim)."""
        projection: Tensor = self.layers(x)
        return projection

"""How good features are: weighted k nearest neighbours and a linear probe, on frozen features.

Both give class scores of shape (N, C), which may be averaged over crops of an image, and
:func:`topk_accuracy` turns them into accuracies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness.graphs import RepeatedStep, repeatable_adam
from benchmarks.harness.loops import progress


@torch.no_grad()
def extract_features(
    encoder: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    device: torch.device | str | None = None,
) -> Tensor:
    """Computes the features of all images, in evaluation mode and without gradient.

    Args:
        encoder: Module or function from images to features of shape (N, ...), which are flattened.
            A module's training mode is restored afterwards.
        batches: Batches of images, shape (N, C, H, W).
        device: Where to compute; None leaves the images where they are.

    Returns:
        Features on the CPU in float32, shape (N of all batches, D).

    Raises:
        ValueError: If there are no batches, or a feature is not finite.

    Examples:
        >>> batches = [torch.ones(3, 1, 4, 4), torch.ones(2, 1, 4, 4)]
        >>> extract_features(nn.AvgPool2d(2), batches).shape
        torch.Size([5, 4])
    """
    training = encoder.training if isinstance(encoder, nn.Module) else False
    if isinstance(encoder, nn.Module):
        encoder.eval()
    try:
        features = [encoder(batch.to(device)).flatten(1).float().cpu() for batch in batches]
    finally:
        if isinstance(encoder, nn.Module):
            encoder.train(training)
    if not features:
        raise ValueError("batches must not be empty but holds no batch.")
    joined = torch.cat(features)
    if not torch.isfinite(joined).all():
        raise ValueError(
            "the encoder's features must be finite but hold NaN or infinite values; the training "
            "has diverged: lower the learning rate."
        )
    return joined


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Computes class scores by weighted k nearest neighbours with cosine similarity.

    Each of the k most similar training samples votes for its class with exp(similarity /
    temperature).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    CVPR 2018 (arXiv 1805.01978), section 3.4.

    Args:
        train_features: Shape (N, D).
        train_labels: Integers of shape (N,), in [0, num_classes).
        test_features: Shape (M, D).
        k: Number of neighbours; all N if there are fewer.
        temperature: Positive; the smaller, the more the nearest ones count.
        num_classes: Number of classes; None means the largest label + 1.
        chunk_size: Test samples compared at a time, which bounds the memory.

    Returns:
        Scores of shape (M, num_classes), at least 0, each row summing to 1.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.

    Examples:
        >>> train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_scores(train, torch.tensor([0, 0, 1]), torch.tensor([[0.8, 0.2]]), k=2)
        tensor([[1., 0.]])
    """
    _check(train_features, train_labels)
    if test_features.ndim != 2 or test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test_features must have shape (M, {train_features.shape[1]}) "
            f"but has shape {tuple(test_features.shape)}."
        )
    if k < 1 or temperature <= 0 or chunk_size < 1:
        raise ValueError(
            "k and chunk_size must be at least 1 and temperature above 0 "
            f"but are {k}, {chunk_size} and {temperature}."
        )
    classes = _num_classes(train_labels, num_classes)
    bank = F.normalize(train_features.float(), dim=1).T
    scores = []
    for chunk in test_features.float().split(chunk_size):
        similarity, index = (F.normalize(chunk, dim=1) @ bank).topk(min(k, len(train_features)))
        weights = (similarity / temperature).softmax(dim=1)
        votes = weights.new_zeros(len(chunk), classes)
        scores.append(votes.scatter_add_(1, train_labels[index], weights))
    return torch.cat(scores)


class LinearProbe(nn.Module):
    """A linear classifier on features standardised by the training features' statistics.

    Args:
        features: Training features of shape (N, D), whose mean and standard deviation are kept.
        num_classes: Number of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: Tensor, num_classes: int) -> None:
        super().__init__()
        std, mean = torch.std_mean(features.float(), dim=0, correction=0)
        self.register_buffer("mean", mean)
        # A coordinate that varies by rounding only is set to 0 instead of being blown up.
        self.register_buffer("std", torch.where(std > 1e-6 * mean.abs(), std, torch.inf))
        self.linear = nn.Linear(features.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Computes the logits, shape (N, num_classes), of features of shape (N, D)."""
        logits: Tensor = self.linear((features.float() - self.mean) / self.std)
        return logits


def train_linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    epochs: int = 100,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    seed: int = 0,
    description: str | None = None,
) -> LinearProbe:
    """Trains a linear classifier on frozen features: Adam, cosine schedule to 0.

    The features are standardised per coordinate, so that one learning rate serves features of any
    scale. The weights start at 0; ``seed`` draws the order of the samples.

    Source: the linear evaluation of MV-MR, Entropy 26(6):466, 2024 (Adam, 1e-3, cosine to 0, 100
    epochs); the standardisation is ours.

    Args:
        features: Training features of shape (N, D).
        labels: Integers of shape (N,), in [0, num_classes).
        num_classes: Number of classes; None means the largest label + 1.
        epochs: Passes over the features.
        learning_rate: Adam's, at the start.
        weight_decay: Adam's.
        batch_size: Samples a step.
        seed: Draws the order of the samples.
        description: What a progress bar calls the training; None shows none.

    Returns:
        The trained probe, in evaluation mode, on the features' device; it maps features to logits.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.

    Examples:
        >>> features, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> probe = train_linear_probe(features, labels, epochs=20)
        >>> probe(features).argmax(dim=1)
        tensor([0, 0, 1, 1])
    """
    _check(features, labels)
    if epochs < 1 or batch_size < 1 or learning_rate <= 0:
        raise ValueError(
            "epochs and batch_size must be at least 1 and learning_rate above 0 "
            f"but are {epochs}, {batch_size} and {learning_rate}."
        )
    probe = LinearProbe(features, _num_classes(labels, num_classes)).to(features.device)
    optimizer = repeatable_adam(probe.parameters(), learning_rate, weight_decay, features.device)
    steps = epochs * -(-len(features) // batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    # Batches are equally large but for the last of an epoch.
    sizes = {min(batch_size, len(features)), len(features) % batch_size or batch_size}
    indices = {n: torch.zeros(n, dtype=torch.long, device=features.device) for n in sizes}

    def step(index: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(probe(features[index]), labels[index]).backward()
        optimizer.step()

    steps_of = {
        n: RepeatedStep(functools.partial(step, index), features.device)
        for n, index in indices.items()
    }
    for _ in progress(range(epochs), description, unit="epoch"):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for index in order.split(batch_size):
            indices[len(index)].copy_(index)
            steps_of[len(index)]()
            scheduler.step()
    return probe.eval().requires_grad_(False)


def topk_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Computes how often the right class is among the k highest scores.

    Args:
        scores: Class scores or logits of shape (N, C).
        labels: Integers of shape (N,).
        ks: The k's; one larger than C counts as C.

    Returns:
        ``{"top1": ..., "top5": ...}`` in percent.

    Raises:
        ValueError: If shapes do not fit.

    Examples:
        >>> scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
        >>> topk_accuracy(scores, torch.tensor([0, 1]), ks=(1, 2))
        {'top1': 50.0, 'top2': 100.0}
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(scores) == 0:
        raise ValueError(
            "scores and labels must have shapes (N, C) and (N,), N >= 1, "
            f"but have {tuple(scores.shape)} and {tuple(labels.shape)}."
        )
    ranked = scores.topk(min(max(ks), scores.shape[1])).indices
    hits = ranked == labels[:, None]
    return {f"top{k}": 100 * hits[:, :k].any(dim=1).double().mean().item() for k in ks}


def evaluate_features(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    seed: int = 0,
    description: str | None = None,
) -> dict[str, dict[str, float]]:
    """Computes the accuracy of weighted kNN and of a linear probe, with their default settings.

    Args:
        train_features: Shape (N, D).
        train_labels: Integers of shape (N,).
        test_features: Shape (M, D).
        test_labels: Integers of shape (M,).
        seed: Of the linear probe.
        description: What a progress bar calls the linear probe's training; None shows none.

    Returns:
        ``{"knn": {"top1": ..., "top5": ...}, "linear": {...}}`` in percent.

    Raises:
        ValueError: If shapes do not fit.
    """
    probe = train_linear_probe(train_features, train_labels, seed=seed, description=description)
    return {
        "knn": topk_accuracy(knn_scores(train_features, train_labels, test_features), test_labels),
        "linear": topk_accuracy(probe(test_features), test_labels),
    }


def _check(features: Tensor, labels: Tensor) -> None:
    """Raises unless there are features and one label for each."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or features.numel() == 0:
        raise ValueError(
            "features and labels must have shapes (N, D) and (N,), N >= 1, "
            f"but have {tuple(features.shape)} and {tuple(labels.shape)}."
        )


def _num_classes(labels: Tensor, num_classes: int | None) -> int:
    """Returns the number of classes after checking the labels' range."""
    smallest, largest = int(labels.min()), int(labels.max())
    if num_classes is None:
        num_classes = largest + 1
    if smallest < 0 or largest >= num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}) but are in [{smallest}, {largest}]."
        )
    return num_classes

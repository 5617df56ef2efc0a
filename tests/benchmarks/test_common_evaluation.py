import math

import pytest
import torch
from torch import nn

from benchmarks.common.evaluation import (
    evaluate_features,
    extract_features,
    knn_scores,
    topk_accuracy,
    train_linear_probe,
)


@pytest.fixture
def clusters():
    """Features of three noisy classes, on very different scales a coordinate."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 6, generator=generator)
    labels = torch.arange(240) % 3
    features = centers[labels] + 0.5 * torch.randn(240, 6, generator=generator)
    return features, labels


def plain_knn(train, labels, test, k, temperature, classes):
    """Wu et al.'s classifier, one sample and one neighbour at a time."""
    scores = torch.zeros(len(test), classes)
    for i, x in enumerate(test):
        similarity = [(nn.functional.cosine_similarity(x, y, dim=0).item()) for y in train]
        for j in sorted(range(len(train)), key=lambda j: -similarity[j])[:k]:
            scores[i, labels[j]] += math.exp(similarity[j] / temperature)
    return scores / scores.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("k", "temperature", "chunk_size"), [(1, 0.07, 7), (20, 0.07, 1024), (5, 1, 1)]
)
def test_knn_is_the_plain_definition(clusters, k, temperature, chunk_size):
    features, labels = clusters
    scores = knn_scores(
        features[:80],
        labels[:80],
        features[80:100],
        k=k,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    expected = plain_knn(features[:80], labels[:80], features[80:100], k, temperature, 3)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_knn_with_fewer_samples_than_neighbours(clusters):
    features, labels = clusters
    scores = knn_scores(features[:3], labels[:3], features[:3], num_classes=7)
    assert scores.shape == (3, 7)
    assert scores.argmax(dim=1).tolist() == labels[:3].tolist()


def test_linear_probe_separates_and_repeats(clusters):
    features, labels = clusters
    features = features * torch.logspace(-4, 4, 6)
    first, second = (train_linear_probe(features[:120], labels[:120], seed=3) for _ in range(2))
    assert torch.equal(first(features), second(features))
    other = train_linear_probe(features[:120], labels[:120], seed=3, batch_size=32)
    assert not torch.equal(first(features), other(features))
    assert topk_accuracy(first(features[120:]), labels[120:])["top1"] > 90


def test_linear_probe_approaches_the_optimum(clusters):
    features, labels = clusters
    labels = torch.where(torch.arange(240) % 4 == 0, (labels + 1) % 3, labels)  # inseparable
    probe = train_linear_probe(features, labels, epochs=400, learning_rate=0.03, batch_size=240)
    loss = nn.functional.cross_entropy(probe(features), labels)
    best = nn.Linear(6, 3)
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=500, line_search_fn="strong_wolfe")
    standard = (features - features.mean(0)) / features.std(0)

    def closure():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(best(standard), labels)
        value.backward()
        return value

    optimizer.step(closure)
    assert loss.item() == pytest.approx(closure().item(), abs=0.01)


def test_linear_probe_on_constant_coordinates():
    features = torch.cat([torch.eye(4), torch.full((4, 2), 3.0)], dim=1)
    probe = train_linear_probe(features, torch.arange(4), epochs=300, learning_rate=0.1)
    assert torch.isfinite(probe(features)).all()
    assert probe(features).argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_topk_accuracy():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.1, 0.7, 0.2], [0.6, 0.3, 0.1]])
    accuracy = topk_accuracy(scores, torch.tensor([0, 1, 0, 2]), ks=(1, 2, 5))
    assert accuracy == {"top1": 25.0, "top2": 50.0, "top5": 100.0}


def test_extract_features_restores_the_mode():
    encoder = nn.Sequential(nn.Dropout(0.5), nn.Flatten())
    images = torch.ones(5, 2, 3, 3)
    features = extract_features(encoder, images.split(2))
    assert torch.equal(features, torch.ones(5, 18))
    assert encoder.training


def test_extract_features_exception():
    with pytest.raises(ValueError, match="batches must not be empty"):
        extract_features(nn.Flatten(), [])
    with pytest.raises(ValueError, match=r"features must be finite .* lower the learning rate"):
        extract_features(nn.Flatten(), [torch.full((1, 2), torch.nan)])


def test_evaluate_features(clusters):
    features, labels = clusters
    result = evaluate_features(features[:120], labels[:120], features[120:], labels[120:])
    assert set(result) == {"knn", "linear"}
    assert result["knn"]["top1"] > 90
    assert result["linear"]["top1"] > 90
    assert result["linear"]["top5"] == 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, y: knn_scores(f, y[:-1], f), "features and labels must have shapes"),
        (lambda f, y: knn_scores(f, y, f[:, :2]), r"test_features must have shape \(M, 6\)"),
        (lambda f, y: knn_scores(f, y, f, k=0), "k and chunk_size must be at least 1"),
        (lambda f, y: knn_scores(f, y, f, temperature=0), "temperature above 0"),
        (lambda f, y: knn_scores(f, y, f, num_classes=2), r"labels must be in \[0, 2\)"),
        (lambda f, y: train_linear_probe(f, y - 1), r"labels must be in \[0, 2\) but"),
        (lambda f, y: train_linear_probe(f[:0], y[:0]), "N >= 1"),
        (lambda f, y: train_linear_probe(f, y, epochs=0), "epochs and batch_size must be at least"),
        (lambda f, y: topk_accuracy(f, y[:3]), "scores and labels must have shapes"),
    ],
)
def test_exception(clusters, call, message):
    with pytest.raises(ValueError, match=message):
        call(*clusters)

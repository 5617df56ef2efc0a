"""What is in a batch of stable-pretraining: views, labels, and the sample's index for a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvmr_loss import DistillationLoss

from .. import fixed  # noqa: TID252 - of the same checkout

# Of a mapping of views, the one that is not augmented.
NON_AUGMENTED = "non_augmented"


class Split(NamedTuple):
    """A batch of several views, taken apart.

    Attributes:
        non_augmented: The view of which the representations are.
        others: The further views.
        rest: The batch without the non-augmented view.
    """

    non_augmented: Mapping[str, Any]
    others: list[Mapping[str, Any]]
    rest: dict[str, Any]


def split_views(batch: dict[str, Any]) -> Split | None:
    """Takes a batch's views apart; None if it is one of single images."""
    views = batch.get("views")
    if views is None and "image" in batch:
        return None
    if isinstance(views, Sequence):
        if not views:
            raise ValueError("batch['views'] must have at least one view but is empty.")
        return Split(views[0], list(views[1:]), {**batch, "views": list(views[1:])})
    named: Mapping[str, Any] = batch if views is None else views
    if NON_AUGMENTED not in named:
        raise ValueError(
            f"batch must have 'image', a list of 'views', or a view named {NON_AUGMENTED!r} but has "
            f"{', '.join(map(repr, named)) or 'nothing'}; use MultiViewTransform([plain, augmented]) or "
            f"MultiViewTransform({{{NON_AUGMENTED!r}: plain, ...}})."
        )
    others = {key: value for key, value in named.items() if key != NON_AUGMENTED}
    listed = [view for view in others.values() if isinstance(view, Mapping) and "image" in view]
    rest = others if views is None else {**batch, "views": others}
    return Split(named[NON_AUGMENTED], listed, rest)


def stack_labels(views: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Returns the labels of all views, as probes want them, if there are any."""
    if any("label" not in view for view in views):
        return {}
    return {"label": torch.cat([view["label"] for view in views])}


def representations_of(
    module: Any,
    view: Mapping[str, Any],
    *,
    needed: bool = False,
    fitted: DistillationLoss | None = None,
) -> dict[str, Tensor] | None:
    """Returns the representations of the non-augmented view, computed or read by ``sample_idx``.

    Args:
        module: Whose ``representations`` they are.
        view: Its ``image``, (N, C, H, W), and ``sample_idx``, (N,).
        needed: Whether the module must have some.
        fitted: What takes its statistics from them where a training begins with all of them cached.

    Returns:
        Name -> tensor of shape (N, D_k); None if the module has none.
    """
    representations = getattr(module, "representations", None)
    if representations is None and not needed:
        return None
    if not isinstance(representations, nn.Module):
        raise TypeError(
            "the module's representations must be a mvmr_loss.Representations but "
            f"{'are missing' if representations is None else f'are {representations!r}'}: "
            "Module(..., representations=Representations(['pixels', 'hog'])), in YAML "
            "representations: {_target_: mvmr_loss.Representations, specification: [pixels, hog]}."
        )
    cache = getattr(representations, "cache", None)
    if cache is None:
        return fixed(representations, view["image"])
    if "sample_idx" not in view:
        raise ValueError(
            "batch must have 'sample_idx', each sample's index in the data set, where representations "
            f"are cached, but has {', '.join(map(repr, view))}; stable-pretraining's data sets give it "
            "(FromTorchDataset(..., add_sample_idx=True))."
        )
    if cache.num_samples is None:
        representations.open_cache(_indexed(module.trainer.train_dataloader.dataset))  # type: ignore[operator]
    # Before anything is stored, so that all processes find the same. A training that is resumed has its
    # statistics, though the store has become full meanwhile.
    if fitted is not None and module.trainer.fit_loop.total_batch_idx == 0:
        fitted.fit_if_full(representations)  # type: ignore[arg-type]
    return fixed(representations, view["image"], view["sample_idx"])


def _indexed(dataset: Any) -> Any:
    """Returns the data set that ``sample_idx`` counts: of a subset, the whole."""
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset

"""What solo-learn computes and does not show: the results of a run, and accuracies of few classes."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

NOTHING_TRAINED = (
    "mvmr-loss: results: none, no epoch was left to train; a run that auto_resume has found is begun "
    "anew by auto_resume.enabled=False"
)
NO_BATCH = (
    "mvmr-loss: results: none, for the data set has no full batch of optimizer.batch_size images for "
    "each process"
)


class ResultPrinter(Callback):
    """Prints the accuracies after each epoch, and all that was logged when training ends."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        accuracies = {n: v for n, v in trainer.callback_metrics.items() if n.endswith("acc1")}
        if trainer.is_global_zero:
            for line in result_lines(accuracies, f"epoch {trainer.current_epoch}"):
                print(line, flush=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            nothing = NO_BATCH if trainer.num_training_batches == 0 else NOTHING_TRAINED
            lines = result_lines(trainer.callback_metrics) or [nothing]
            print(*lines, sep="\n", flush=True)


def result_lines(metrics: Mapping[str, Any], what: str = "results") -> list[str]:
    """Returns the metrics as lines of text, those of the validation first, accuracies before losses.

    Args:
        metrics: Name -> number; of a metric of an epoch and its last step the epoch's is taken.
        what: What they are of.

    Examples:
        >>> result_lines({"val_loss": 2.0, "train_acc1_step": 5.0, "val_acc1": 41.25})
        ['mvmr-loss: results: val_acc1 41.25, val_loss 2']
    """
    names = sorted(n for n in metrics if not n.endswith(("_step", "_epoch")))
    groups = [[n for n in names if n.startswith("val_")], [n for n in names if n[:4] != "val_"]]
    return [
        f"mvmr-loss: {what}: " + ", ".join(f"{n} {float(metrics[n]):.4g}" for n in group)
        for group in groups
        if group
    ]


def print_results(*classes: type) -> None:
    """Has the trainings of solo-learn's modules print their results.

    solo-learn shows them by Weights & Biases alone.

    Args:
        *classes: LightningModules; a ``configure_callbacks`` of theirs is called as well.
    """
    for cls in classes:
        original: Callable[[Any], Any] = cls.configure_callbacks  # type: ignore[attr-defined]

        @functools.wraps(original)
        def configure_callbacks(
            self: Any, original: Callable[[Any], Any] = original
        ) -> list[Callback]:
            callbacks = original(self)
            given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
            return [*given, ResultPrinter()]

        cls.configure_callbacks = configure_callbacks  # type: ignore[attr-defined]


def allow_few_classes(*modules: types.ModuleType) -> None:
    """Has solo-learn's modules count the top k of fewer than k classes as the top of all of them.

    The linear evaluation and methods with a momentum classifier ask for the top five, which torch
    refuses for fewer classes after the training has begun.

    Args:
        *modules: Modules of solo-learn with a function ``accuracy_at_k``.
    """
    said = False

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def accuracy_at_k(
            outputs: Tensor, targets: Tensor, top_k: Sequence[int] = (1, 5)
        ) -> Sequence[Tensor]:
            nonlocal said
            classes = outputs.shape[1]
            if max(top_k) > classes and not said:
                said = True
                print(
                    f"mvmr-loss: the images have {classes} classes, so that acc{max(top_k)} is the "
                    f"accuracy in the top {classes}, always 100",
                    file=sys.stderr,
                )
            found: Sequence[Tensor] = original(outputs, targets, [min(k, classes) for k in top_k])
            return found

        return accuracy_at_k

    for module in modules:
        module.accuracy_at_k = patched(module.accuracy_at_k)  # type: ignore[attr-defined]

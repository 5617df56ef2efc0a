"""The representation terms on any of solo-learn's methods. Importing this imports solo-learn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from solo.methods.base import BaseMethod

from mvmr_loss import MultiRepresentationRegularizer

from .. import fixed  # noqa: TID252 - of the same checkout
from .building import build_representations, logged_terms, take_out, with_host_normalization
from .checks import check_regularizer_pipelines, has_non_augmented_view
from .options import (
    REGULARIZER,
    REGULARIZER_OPTIONS,
    SoloConfigError,
    check_regularizer_options,
    select,
)


class RepresentationRegularized(BaseMethod):  # type: ignore[misc]  # solo-learn has no types
    """A method of solo-learn whose loss the node ``mvmr_regularizer`` adds the terms to.

    Put it before the method: ``class Mine(RepresentationRegularized, VICReg)``. The methods of
    solo-learn's table become such classes by :func:`regularized` when the package is registered.
    Without the node the class is the method, unchanged.

    Each large crop's embeddings meet the representations of the non-augmented image. That image is
    the crop of the last pipeline, if it only resizes and normalises and its crop size is another
    than the method's: the method does not see it. Without such a pipeline the representations are
    read from a cache by sample index.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the multi-representation terms.

    Args:
        cfg: solo-learn's configuration. Its node ``mvmr_regularizer`` has, all with defaults: every
            argument of :class:`~mvmr_loss.MultiRepresentationRegularizer`; ``embeddings``, the name
            of the output of the method's ``forward`` that meets the representations;
            ``representations`` and every option of :class:`~mvmr_loss.Representations`, ``cache``
            among them; ``fill_cache``, whether its store is made and filled in the first epoch.

    Raises:
        SoloConfigError: If a setting does not exist or is out of range, or there is neither a
            non-augmented view nor a cache.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.mvmr_regularizer: MultiRepresentationRegularizer | None = None
        self.mvmr_representations: torch.nn.Module | None = None
        self._mvmr_state: dict[str, torch.Tensor] = {}
        # The embeddings of the step that is being computed; None outside of a training step.
        self._mvmr_embeddings: list[torch.Tensor] | None = None
        if OmegaConf.select(self.cfg, REGULARIZER) is None:
            return
        self._mvmr_options = check_regularizer_options(self.cfg[REGULARIZER])
        self._mvmr_view = has_non_augmented_view(self.cfg.augmentations)
        self.mvmr_regularizer = MultiRepresentationRegularizer(
            **select(self._mvmr_options, REGULARIZER_OPTIONS)
        )
        if self._mvmr_view:  # solo-learn has counted it as a small crop
            self.num_small_crops -= 1
            self.num_crops -= 1
            self.multicrop = self.num_small_crops != 0

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Adds the defaults of the method and of the node, and checks the node and the pipelines."""
        cfg = super().add_and_assert_specific_cfg(cfg)
        if OmegaConf.select(cfg, REGULARIZER) is not None:
            options = check_regularizer_options(cfg[REGULARIZER])
            check_regularizer_pipelines(cfg.augmentations, options)
            cfg[REGULARIZER] = options
        return cfg

    def on_train_start(self) -> None:
        """Builds the representations, for training only: an evaluation needs no teacher or cache."""
        super().on_train_start()
        if self.mvmr_regularizer is not None and self.mvmr_representations is None:
            dataset = getattr(self.trainer.train_dataloader, "dataset", None)
            options = self._mvmr_options
            if self._mvmr_view:
                options = with_host_normalization(options, self.cfg, view=-1)
            built = build_representations(options, dataset, has_images=self._mvmr_view)
            assert built is not None  # an empty list has been refused
            built.load_state_dict(self._mvmr_state, strict=False)
            self.mvmr_representations = built.to(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the state of the representations until they are built."""
        super().on_load_checkpoint(checkpoint)
        self._mvmr_state = take_out(checkpoint["state_dict"], "mvmr_representations.")

    def forward(self, X: torch.Tensor) -> dict[str, Any]:
        """Computes the method's outputs; within a training step, keeps the embeddings."""
        out: dict[str, Any] = super().forward(X)
        if self._mvmr_embeddings is not None:
            name = self._mvmr_options["embeddings"]
            if name not in out:
                raise SoloConfigError(
                    f"{REGULARIZER}.embeddings must name an output of {type(self).__name__}.forward, "
                    f"one of {', '.join(out)}, but is {name!r}."
                )
            self._mvmr_embeddings.append(out[name])
        return out

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Any:
        """Computes the method's loss, adds the representation terms and logs each of them.

        Args:
            batch: Sample indexes, a list of crops (the non-augmented one last, if there is one),
                targets.
            batch_idx: The batch's number.

        Returns:
            What the method returns, with the terms in its loss.
        """
        if self.mvmr_regularizer is None:
            return super().training_step(batch, batch_idx)
        indices, crops, targets = batch
        images = None
        if self._mvmr_view:
            *crops, images = crops
        embeddings: list[torch.Tensor] = []
        self._mvmr_embeddings = embeddings
        try:
            out = super().training_step([indices, crops, targets], batch_idx)
        finally:
            self._mvmr_embeddings = None
        assert self.mvmr_representations is not None
        terms = self.mvmr_regularizer.forward_components(
            embeddings, fixed(self.mvmr_representations, images, indices)
        )
        self.log_dict(logged_terms(terms), on_epoch=True, sync_dist=True)
        total = terms.total
        # solo-learn's base class, which only trains the online classifier, returns all its outputs.
        return {**out, "loss": out["loss"] + total} if isinstance(out, dict) else out + total


@functools.cache
def regularized(method: type[BaseMethod]) -> type[RepresentationRegularized]:
    """Returns a method of solo-learn as one that can carry the regulariser, under its own name.

    Args:
        method: A class of ``solo.methods.METHODS``.

    Returns:
        A subclass of it and of :class:`RepresentationRegularized`; the same one each time.
    """

    def reduce(self: RepresentationRegularized) -> tuple[Any, ...]:
        return _unfilled, (method,), self.__getstate__()

    named = {name: getattr(method, name) for name in ("__module__", "__qualname__", "__doc__")}
    # By its name pickle would find the method itself.
    return type(
        method.__name__, (RepresentationRegularized, method), named | {"__reduce__": reduce}
    )


def _unfilled(method: Any) -> RepresentationRegularized:
    """Returns an instance that pickle then fills; in a process that was spawned, too."""
    cls = regularized(method)
    return cls.__new__(cls)

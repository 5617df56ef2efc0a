"""MV-MR as one of solo-learn's methods. Importing this module imports solo-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from solo.methods.base import BaseMethod

from mvmr_loss import DistillationLoss, MVMRLoss, MVMRProjectionHead
from mvmr_loss.representations.registry import labelled

from .. import distil, fixed, freeze_unused  # noqa: TID252 - of the same checkout
from .building import build_representations, logged_terms, take_out, with_host_normalization
from .checks import check_pipelines
from .options import LOSS_OPTIONS, check_method_options, select


class MVMR(BaseMethod):  # type: ignore[misc]  # solo-learn has no types
    """MV-MR in solo-learn (``method: mvmr``).

    The first crop is the non-augmented view, the second one the augmented view; small crops, if
    any, are further augmented views. The representations are those of the first crop, or are read
    from a cache by sample index.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        cfg: solo-learn's configuration. Its ``method_kwargs`` are, all with defaults:
            ``proj_hidden_dim``, ``proj_output_dim``, ``proj_num_layers`` (see
            :class:`~mvmr_loss.MVMRProjectionHead`); every argument of :class:`~mvmr_loss.MVMRLoss`;
            ``distillation``, options of :class:`~mvmr_loss.DistillationLoss`, which is added on the
            backbone's features, its ``teacher_dims`` naming those of the representations that are
            its teachers; ``representations`` and every option of :class:`~mvmr_loss.Representations`,
            ``cache`` among them; ``fill_cache``, whether its store is made and filled in the first
            epoch.

    Raises:
        SoloConfigError: If a setting does not exist or is out of range, or the pipelines of
            ``augmentations`` are not a non-augmented one and then an augmented one.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.options = check_method_options(self.cfg.method_kwargs)
        self.projector = MVMRProjectionHead(
            self.features_dim,
            self.options["proj_hidden_dim"],
            self.options["proj_output_dim"],
            self.options["proj_num_layers"],
        )
        self.criterion = MVMRLoss(**select(self.options, LOSS_OPTIONS))
        self.distillation: DistillationLoss | None = None
        if self.options["distillation"] is not None:
            self.distillation = DistillationLoss(self.features_dim, **self.options["distillation"])
        specification = self.options["representations"]
        names = labelled(specification) if specification else ()
        freeze_unused(self.projector, self.criterion, self.distillation, names)
        self.representations: torch.nn.Module | None = None
        self._representation_state: dict[str, torch.Tensor] = {}

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Adds the defaults of ``method_kwargs``, and checks them and the pipelines."""
        cfg = super(MVMR, MVMR).add_and_assert_specific_cfg(cfg)
        if OmegaConf.select(cfg, "augmentations") is None:
            cfg.method_kwargs = check_method_options(cfg.method_kwargs)
        else:
            check_pipelines(cfg.augmentations)
            size = cfg.augmentations[0].crop_size
            cfg.method_kwargs = check_method_options(cfg.method_kwargs, size)
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = super().learnable_params
        groups = [*groups, {"name": "projector", "params": self.projector.parameters()}]
        if self.distillation is not None:
            groups.append({"name": "distillation", "params": self.distillation.parameters()})
        return groups

    def on_train_start(self) -> None:
        """Builds the representations, for training only: an evaluation needs no teacher or cache."""
        super().on_train_start()
        if self.representations is None:
            dataset = getattr(self.trainer.train_dataloader, "dataset", None)
            options = with_host_normalization(self.options, self.cfg, view=0)
            built = build_representations(options, dataset)
            if built is not None:
                built.load_state_dict(self._representation_state, strict=False)
                self.representations = built.to(self.device)
                # A training that is resumed has its statistics, though the store is full by now.
                if self.distillation is not None and self.trainer.global_step == 0:
                    self.distillation.fit_if_full(built)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the state of the representations until they are built."""
        state = checkpoint["state_dict"]
        self._representation_state = take_out(state, "representations.")

    def forward(self, X: torch.Tensor) -> dict[str, Any]:
        """Adds ``z``, the embeddings of shape (N, proj_output_dim), to what solo-learn computes."""
        out: dict[str, Any] = super().forward(X)
        return {**out, "z": self.projector(out["feats"])}

    def multicrop_forward(self, X: torch.Tensor) -> dict[str, Any]:
        out: dict[str, Any] = super().multicrop_forward(X)
        return {**out, "z": self.projector(out["feats"])}

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> torch.Tensor:
        """Computes the loss of a batch and logs each weighted term.

        Args:
            batch: Sample indexes, a list of crops (the non-augmented one first), targets.
            batch_idx: The batch's number.

        Returns:
            The MV-MR loss and the loss of the online classifier, which takes detached features.
        """
        indices, (images, *_), _ = batch
        out = super().training_step(batch, batch_idx)
        z, *z_augmented = out["z"]
        representations: Mapping[str, torch.Tensor] = (
            {} if self.representations is None else fixed(self.representations, images, indices)
        )
        logged, total = {}, out["loss"]
        distilled, representations = distil(self.distillation, out["feats"], representations)
        if distilled is not None:
            logged, total = logged_terms(distilled), total + distilled.total
        terms = self.criterion.forward_components(z, z_augmented, representations)
        logged |= {"train_mvmr_loss": terms.total, **logged_terms(terms)}
        self.log_dict(logged, on_epoch=True, sync_dist=True)
        loss: torch.Tensor = terms.total + total
        return loss

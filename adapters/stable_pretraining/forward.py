"""The forward functions, and what they read from a module and a batch."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mvmr_loss import DistillationLoss, MultiRepresentationRegularizer, MVMRLoss

from .. import distil  # noqa: TID252 - of the same checkout
from .batches import representations_of, split_views, stack_labels

Forward = Callable[[Any, dict[str, Any], str], dict[str, Any]]


def mvmr(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
    """Trains by the MV-MR loss; a ``forward`` of ``stable_pretraining.Module``.

    The module has

    - ``backbone`` and ``projector``: from images (N, C, H, W) to features and on to embeddings (N, D);
    - ``loss``: a :class:`~mvmr_loss.MVMRLoss`, with ``gather_distributed=True`` for several processes;
    - ``representations``: a :class:`~mvmr_loss.Representations`; left out or None: no such terms;
    - ``distillation``: a :class:`~mvmr_loss.DistillationLoss`, which is added on the features; left out
      or None: every representation is the loss's. A training that begins with a full cache fits it.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).

    Args:
        self: The module.
        batch: Of ``MultiViewTransform``: ``views``, two or more, the non-augmented one first; or named
            views, that one called ``non_augmented``. Each has ``image``, (N, C, H, W), maybe ``label``,
            (N,), and, where representations are cached, ``sample_idx``, (N,). Or ``image`` and
            ``label`` alone, as in validation.
        stage: "fit" computes and logs the loss, each term as ``fit/NAME``; others only embed.

    Returns:
        ``embedding``: the features of all views, one after the other; ``label``, likewise, if there are
        any; ``loss``, in training.

    Raises:
        TypeError: If the loss is missing or another one, or ``distillation`` is.
        ValueError: If training has fewer than two views, or a cache no ``sample_idx``.

    Examples:
        >>> from stable_pretraining import Module  # doctest: +SKIP
        >>> module = Module(
        ...     forward=mvmr, backbone=backbone, projector=projector, loss=MVMRLoss(),
        ...     representations=Representations(["pixels", "hog"]), optim=optim,
        ... )  # doctest: +SKIP
    """
    split = split_views(batch)
    views = [batch] if split is None else [split.non_augmented, *split.others]
    features = [self.backbone(view["image"]) for view in views]
    out = {"embedding": torch.cat(features), **stack_labels(views)}
    if stage == "fit":
        loss = _part(self, "loss", MVMRLoss)
        distillation = getattr(self, "distillation", None)
        if distillation is not None:
            distillation = _part(self, "distillation", DistillationLoss)
        if len(views) < 2:
            raise ValueError(
                "batch must have at least two views, the non-augmented one first, but has "
                f"{len(views)}; use MultiViewTransform([plain, augmented])."
            )
        z, *z_augmented = [self.projector(f) for f in features]
        represented = representations_of(self, views[0], fitted=distillation) or {}
        distilled, others = distil(distillation, features, represented)
        terms = loss.forward_components(z, z_augmented, others)
        named, out["loss"] = terms.as_dict(f"{stage}/"), terms.total
        if distilled is not None:
            out["loss"] = out["loss"] + distilled.total
            named = distilled.as_dict(f"{stage}/") | named | {f"{stage}/loss": out["loss"]}
        _log(self, named, views[0])
    return out


def distill(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
    """Trains a student by a frozen teacher's features; a ``forward`` of ``stable_pretraining.Module``.

    No labels and no view terms; with these besides, it is :func:`mvmr` with a ``distillation``. The
    module has

    - ``backbone``: from images (N, C, H, W) to features (N, D);
    - ``loss``: a :class:`~mvmr_loss.DistillationLoss`, regression through heads of its own and
      dependence; or a :class:`~mvmr_loss.MultiRepresentationRegularizer`, dependence alone. A
      training that begins with a full cache fits the former;
    - ``representations``: a :class:`~mvmr_loss.Representations`, the teachers;
    - ``projector``, if the features are not to meet the teachers themselves.

    The heads are parts of ``loss``: the module's optimiser trains them, and ``backbone`` has none. Of
    several optimisers, one must have ``loss``.

    Args:
        self: The module.
        batch: As for :func:`mvmr`; ``image`` and ``label`` alone are enough in training, too. The
            teachers' features are those of the non-augmented view, and all views meet them.
        stage: "fit" computes and logs the loss, each term as ``fit/NAME``; others only embed.

    Returns:
        As of :func:`mvmr`.

    Raises:
        TypeError: If the loss is missing or another one, or the module has a ``distillation``.
        ValueError: If there are no representations, some are no teachers of a ``DistillationLoss``, or
            a cache has no ``sample_idx``.

    Examples:
        >>> from stable_pretraining import Module  # doctest: +SKIP
        >>> module = Module(
        ...     forward=distill, backbone=backbone, loss=DistillationLoss(512, {"teacher": 384}),
        ...     representations=Representations({"teacher": teacher}), optim=optim,
        ... )  # doctest: +SKIP
    """
    split = split_views(batch)
    views = [batch] if split is None else [split.non_augmented, *split.others]
    features = [self.backbone(view["image"]) for view in views]
    out = {"embedding": torch.cat(features), **stack_labels(views)}
    if stage == "fit":
        _refuse_distillation(
            self, "distill", "give the DistillationLoss as the module's loss: Module(..., loss=...)"
        )
        loss = _part(self, "loss", DistillationLoss, MultiRepresentationRegularizer)
        fitted = loss if isinstance(loss, DistillationLoss) else None
        represented = representations_of(self, views[0], needed=True, fitted=fitted) or {}
        project = getattr(self, "projector", None) or nn.Identity()
        z = [project(f) for f in features]
        terms, others = distil(fitted, z, represented)
        if terms is None:
            terms = loss.forward_components(z, others)
        elif others:
            raise ValueError(
                f"the module's representations must be the teachers of its loss, "
                f"{', '.join(loss.teacher_dims)}, alone but have {', '.join(others)} besides: name "
                "them in teacher_dims, or leave them out."
            )
        out["loss"] = terms.total
        _log(self, terms.as_dict(f"{stage}/"), views[0])
    return out


def regularized(forward: Forward | str, embeddings: str = "projector") -> Forward:
    """Adds the representation terms of MV-MR to another forward function's loss.

    The function gets the batch without its non-augmented view, of which the representations are. What
    the module's part ``embeddings`` puts out meanwhile, meets them. The module has, besides what that
    function needs, ``loss``, a :class:`~mvmr_loss.MultiRepresentationRegularizer`, and
    ``representations``, a :class:`~mvmr_loss.Representations`.

    Args:
        forward: Such as ``stable_pretraining.forward.vicreg``, or its dotted path.
        embeddings: The name of the module's part whose outputs (N, D) are the embeddings; of a
            ``TeacherStudentWrapper`` the student's, ``"projector.student"``.

    Returns:
        A ``forward`` of ``stable_pretraining.Module``, whose batches have one view more, the
        non-augmented one, first or called ``non_augmented``. It logs ``fit/representations/NAME`` and
        the sum of both losses as ``fit/regularized_loss``.

    Raises:
        TypeError: If ``forward`` is no function; in training, if the loss is missing or another one,
            or the module has a ``distillation``.
        ValueError: If there is no function of that path; in training, if there are no views or no
            embeddings.

    Examples:
        >>> from stable_pretraining.forward import vicreg  # doctest: +SKIP
        >>> module = Module(forward=regularized(vicreg), vicreg_loss=VICRegLoss(), ...)  # doctest: +SKIP
    """
    if isinstance(forward, str):
        try:
            forward = pkgutil.resolve_name(forward)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                "forward must be a function or its dotted path, such as "
                f"'stable_pretraining.forward.vicreg', but is {forward!r}: {error}"
            ) from error
    if not callable(forward):
        raise TypeError(f"forward must be a function but is a {type(forward).__name__}.")
    # No closure: Lightning pickles a module's forward where it starts processes by spawning.
    return functools.partial(_regularized, forward=forward, embeddings=embeddings)


def _regularized(
    self: Any, batch: dict[str, Any], stage: str, *, forward: Forward, embeddings: str
) -> dict[str, Any]:
    split = split_views(batch)
    if split is None and stage != "fit":
        return forward(self, batch, stage)
    if split is None:
        raise ValueError(
            "batch must have views in training, of which the non-augmented one has the representations, "
            "but has a single 'image'; use MultiViewTransform([plain, augmented, ...])."
        )
    if stage == "fit":
        _refuse_distillation(
            self,
            "regularized",
            "take mvmr, which adds it to the MV-MR loss, or distill, which trains by it alone",
        )
    recorded: list[Any] = []
    part = _submodule(self, embeddings)
    handle = part.register_forward_hook(lambda _module, _inputs, output: recorded.append(output))
    try:
        out = forward(self, split.rest, stage)
    finally:
        handle.remove()
    if stage == "fit":
        loss = _part(self, "loss", MultiRepresentationRegularizer)
        features = representations_of(self, split.non_augmented, needed=True)
        z = _embeddings(recorded, len(split.non_augmented["image"]), embeddings)
        terms = loss.forward_components(z, features)
        out["loss"] = out["loss"] + terms.total
        named = terms.as_dict(f"{stage}/")
        del named[f"{stage}/loss"]  # which is the name of the function's own
        named[f"{stage}/regularized_loss"] = out["loss"]
        _log(self, named, split.non_augmented)
    return out


def _submodule(module: Any, name: str) -> nn.Module:
    try:
        part: nn.Module = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"embeddings must be the name of a part of the module but is {name!r}: {error}"
        ) from error
    return part


def _embeddings(recorded: list[Any], size: int, name: str) -> list[Tensor]:
    """Returns the recorded outputs as embeddings (N, D), of several views in one as several."""
    z: list[Tensor] = []
    for output in recorded:
        if isinstance(output, Tensor) and output.requires_grad:
            if output.ndim != 2 or len(output) % size:
                raise ValueError(
                    f"the outputs of {name!r} must be embeddings of shape ({size}, D), or of several "
                    f"views at once, but have shape {tuple(output.shape)}; name another part by "
                    "regularized(forward, embeddings=...)."
                )
            z.extend(output.split(size))
    if not z:
        raise ValueError(
            f"{name!r} must put out embeddings with a gradient, but was not called or put out none; "
            "name another part by regularized(forward, embeddings=...), such as 'projector.student' "
            "of a TeacherStudentWrapper."
        )
    return z


def _part(module: Any, name: str, *kinds: type[nn.Module]) -> Any:
    part = getattr(module, name, None)
    if not isinstance(part, kinds):
        first = kinds[0].__name__
        raise TypeError(
            f"the module's {name} must be a {' or a '.join(f'mvmr_loss.{k.__name__}' for k in kinds)} "
            f"but is {'missing' if part is None else f'a {type(part).__name__}'}: Module(..., "
            f"{name}={first}(...)), in YAML {name}: {{_target_: mvmr_loss.{first}, ...}}."
        )
    return part


def _refuse_distillation(module: Any, forward: str, instead: str) -> None:
    given = getattr(module, "distillation", None)
    if given is not None:
        raise TypeError(
            f"the module's distillation must be left out with the forward {forward}, which does not "
            f"read it, but is a {type(given).__name__}; {instead}."
        )


def _log(module: Any, named: Mapping[str, Tensor], view: Mapping[str, Any]) -> None:
    size = len(view["image"])  # which Lightning could only guess of a batch of views
    module.log_dict(named, on_step=True, on_epoch=True, sync_dist=True, batch_size=size)

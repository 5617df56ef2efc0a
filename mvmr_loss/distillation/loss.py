"""Distillation: regression onto teachers and dependence on them, in one loss."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvmr_loss._checks import (
    as_rows,
    check_batch,
    check_bool,
    check_choice,
    check_finite_by,
    check_int,
)
from mvmr_loss._objective import (
    LossComponents,
    Measure,
    Weights,
    check_weights,
    checked_batch,
    dependence_terms,
    measure_of_batch,
    named_views,
    unit_length,
)
from mvmr_loss.cache import RepresentationCache
from mvmr_loss.dependence import dependence_measure as resolve_measure
from mvmr_loss.dependence.cross import CenteredDistances
from mvmr_loss.distillation.bank import AnchorBank, check_teacher_dims
from mvmr_loss.distillation.regression import TeacherRegression
from mvmr_loss.distillation.standardization import Rotation, Scale, Standardization, stored_features
from mvmr_loss.distributed import gather
from mvmr_loss.presets import preset_settings
from mvmr_loss.representations import Representations

# What the distance correlation without options says of itself.
_PLAIN = resolve_measure("distance_correlation").extra_repr()


class DistillationLoss(nn.Module):
    """Distils one or several teachers: regression onto their features, and dependence on them.

    For each teacher, with the regression's mean over the views z::

        L =   regression_weight (1 - cos(head(z), y') + smooth_l1(head(z), y'))
            + dependence_weight (1 - dependence(z, y))

    with y' the teacher's features, standardised, and a head for each teacher that is
    trained with the loss and left behind; y is y' with ``scale="coordinate"``, and else the features
    as they come: one scale for all coordinates changes no distance correlation, but a measure that
    has a unit, as by a ``bandwidth``, has the teacher's. Give it the student's backbone features, and
    add it to any other loss. Regression says where a feature lies, dependence which images are far
    from which; the latter needs no head and sees the embeddings themselves. The defaults are the best
    known recipe; of the dependence it is that of all views as one batch, not a mean over views.

    Call :meth:`fit` before the training, with the store of the teachers' features; without, they are
    standardised by the statistics of the batches seen so far. With ``anchors``, call :meth:`update`
    after each step.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the dependence; see
    :class:`TeacherRegression` for the regression.

    Args:
        embedding_dim: Width D of the student's embeddings.
        teacher_dims: Name of each teacher -> width of its features; not empty.
        regression_weight: Weight of the regression, one for all teachers or one a name, at least 0.
        dependence_weight: Weight of the dependence, likewise; a negative one rewards independence.
            With 0 there is none; alone (``regression_weight=0``) it needs no head and trains no
            parameters, and is best measured by ``"u_distance_correlation_sqr"``.
        hidden_dim: As of :class:`TeacherRegression`.
        cosine_weight: As of :class:`TeacherRegression`.
        smooth_l1_weight: As of :class:`TeacherRegression`.
        scale: As of :class:`TeacherRegression`.
        rotation: As of :class:`TeacherRegression`.
        directions: Whether the dependence is that of the directions of embeddings and features, scaled
            to length 1, which a cosine compares, rather than of both as they are.
        stacked: Whether the dependence is that of all views as one batch, in which the views of an
            image have one teacher's feature and so are asked to lie together; else a mean over views.
        dependence_measure: A name, a mapping with a ``name`` and options, or a measure, see
            :func:`mvmr_loss.dependence.dependence_measure`.
        anchors: Number of earlier samples kept, see :class:`AnchorBank`, whose distances the
            dependence compares beside those within the batch; for the distance correlation only.
        gather_distributed: If True, the dependence is that of the whole batch of all processes. The
            regression is a mean over samples and needs no exchange.

    Attributes:
        dependence_weight: Name of each teacher -> weight. May be set during a training, as in the
            constructor.
        regression_weight: Likewise; a teacher without a head, as its weight was 0, gets none.
        regressions: Name of each teacher -> :class:`TeacherRegression`; empty where no weight is
            above 0.
        bank: The :class:`AnchorBank`, or None.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range, or names differ.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> features = {"clip": torch.randn(100, 32), "dino": torch.randn(100, 24)}
        >>> criterion = DistillationLoss(8, {"clip": 32, "dino": 24})
        >>> _ = criterion.fit(features)
        >>> h, h_augmented = torch.randn(2, 16, 8)  # of the student's backbone
        >>> batch = {name: values[:16] for name, values in features.items()}
        >>> components = criterion.forward_components([h, h_augmented], batch)
        >>> list(components.terms)
        ['regression/clip', 'regression/dino', 'dependence/clip', 'dependence/dino']
    """

    def __init__(
        self,
        embedding_dim: int,
        teacher_dims: Mapping[str, int],
        *,
        regression_weight: Weights = 1.0,
        dependence_weight: Weights = 0.3,
        hidden_dim: int | None = None,
        cosine_weight: float = 1.0,
        smooth_l1_weight: float = 1.0,
        scale: Scale = "isotropic",
        rotation: Rotation = "auto",
        directions: bool = False,
        stacked: bool = True,
        dependence_measure: Measure = "distance_correlation",
        anchors: int = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_dim = check_int("embedding_dim", embedding_dim, minimum=1)
        self.teacher_dims = check_teacher_dims(teacher_dims)
        if not self.teacher_dims:
            raise ValueError("teacher_dims must name at least one teacher but is {}.")
        self._regression_weight = self._by_name("regression_weight", regression_weight, minimum=0)
        self._dependence_weight = self._by_name("dependence_weight", dependence_weight)
        _check_not_all_0(self._regression_weight, self._dependence_weight)
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)
        self.scale = check_choice("scale", scale, ("isotropic", "coordinate"))
        head = functools.partial(
            TeacherRegression,
            hidden_dim=hidden_dim,
            cosine_weight=cosine_weight,
            smooth_l1_weight=smooth_l1_weight,
            scale=scale,
            rotation=rotation,
            gather_distributed=gather_distributed,
        )
        self.regressions = nn.ModuleDict(
            {
                name: head(embedding_dim, self.teacher_dims[name])
                for name, weight in self._regression_weight.items()
                if weight > 0
            }
        )
        if not self.regressions:  # What is said of heads is looked at all the same.
            with torch.device("meta"):
                head(1, 1)
        # Of who has no regression.
        self.standardizations = nn.ModuleDict(
            {
                name: Standardization(width, scale=scale, gather_distributed=gather_distributed)
                for name, width in self.teacher_dims.items()
                if scale == "coordinate" and name not in self.regressions
            }
        )
        self.directions = check_bool("directions", directions)
        self.stacked = check_bool("stacked", stacked)
        self.measure = measure_of_batch("dependence_measure", dependence_measure)
        anchors = check_int("anchors", anchors, minimum=0)
        self.bank = AnchorBank(anchors, embedding_dim, self.teacher_dims) if anchors else None
        if anchors and not any(self.dependence_weight.values()):
            raise ValueError(
                f"anchors must be 0 where dependence_weight is 0, whose they are, but are {anchors}."
            )
        named = getattr(self.measure, "name", None)
        if anchors and (named != "distance_correlation" or self.measure.extra_repr() != _PLAIN):
            raise ValueError(
                "dependence_measure must be 'distance_correlation', without options, with anchors but "
                f"is {dependence_measure!r}; choose anchors=0 for others."
            )

    @property
    def regression_weight(self) -> Mapping[str, float]:
        """Name of each teacher -> weight of its regression; set it as a whole."""
        return MappingProxyType(self._regression_weight)

    @regression_weight.setter
    def regression_weight(self, weights: Weights) -> None:
        new = self._by_name("regression_weight", weights, minimum=0)
        for name, weight in new.items():
            if weight > 0 and name not in self.regressions:
                raise ValueError(
                    f"regression_weight must be 0 for {name!r}, which has no head as its weight was 0 "
                    f"at first, but is {weight}."
                )
        _check_not_all_0(new, self._dependence_weight)
        self._regression_weight = new

    @property
    def dependence_weight(self) -> Mapping[str, float]:
        """Name of each teacher -> weight of its dependence; set it as a whole."""
        return MappingProxyType(self._dependence_weight)

    @dependence_weight.setter
    def dependence_weight(self, weights: Weights) -> None:
        new = self._by_name("dependence_weight", weights)
        if not self.regressions and not any(new.values()):
            raise ValueError("dependence_weight must not be 0 where no teacher has a head.")
        _check_not_all_0(self._regression_weight, new)
        self._dependence_weight = new

    @classmethod
    def from_preset(
        cls, preset: str, embedding_dim: int, teacher_dims: Mapping[str, int], **options: Any
    ) -> DistillationLoss:
        """Returns what a preset has on the backbone's features, see :func:`mvmr_loss.preset_settings`.

        Args:
            preset: Its name.
            embedding_dim: Width of the backbone's features.
            teacher_dims: Name of each representation -> its width.
            **options: Options that take the place of the preset's.

        Raises:
            ValueError: If the preset has nothing there.

        Examples:
            >>> dims = {"scattering": 1024, "hog": 1024}
            >>> DistillationLoss.from_preset("features", 512, dims).scale
            'coordinate'
            >>> DistillationLoss.from_preset("distillation", 512, {"teacher": 768}).stacked
            True
        """
        settings = preset_settings(preset).distillation
        if settings is None:
            raise ValueError(
                "preset must be one with terms on the features, such as 'features' or 'distillation', "
                f"but is {preset!r}."
            )
        return cls(embedding_dim, teacher_dims, **{**settings, **options})

    def fit(
        self, source: Representations | RepresentationCache | Mapping[str, Any]
    ) -> DistillationLoss:
        """Takes the statistics by which the teachers' features are standardised.

        Args:
            source: Where the teachers' features of the whole data set are: representations with a
                full cache, or its store; or name -> tensor of shape (N, E), or an iterable of parts.

        Returns:
            The module itself.

        Raises:
            TypeError: If a feature is no floating-point tensor.
            ValueError: If a teacher or samples are missing, or features are of another width.
        """
        if isinstance(source, Representations):
            store = None if source.cache is None else source.cache.store
            if store is None:
                raise ValueError("source must have a cache with an open store but has none.")
            source = store
        if isinstance(source, RepresentationCache):
            store = source
            source = {name: stored_features(store, name) for name in store.widths}
        if not isinstance(source, Mapping):
            raise TypeError(
                "source must be representations with a cache, its store, or a mapping from name to "
                f"features but is a {type(source).__name__}."
            )
        own = self._standardizations()
        for name, standardization in own.items():
            if name not in source:
                raise ValueError(f"source must have {', '.join(own)} but has {', '.join(source)}.")
            try:
                standardization.fit(source[name])
            except (TypeError, ValueError) as error:
                raise type(error)(f"source[{name!r}]: {error}") from error
        return self

    def _standardizations(self) -> dict[str, Standardization]:
        """Returns what standardises each teacher's features."""
        regressions = cast("dict[str, TeacherRegression]", self.regressions)
        own = {name: regression.standardization for name, regression in regressions.items()}
        return {**own, **cast("dict[str, Standardization]", self.standardizations)}

    def fit_if_full(self, representations: Representations) -> bool:
        """Fits to a cache that has all samples; a trainer may call it whatever cache there is.

        At the start of a training only: one that is resumed has the statistics it began with. Warns of
        a cache that is not full. A teacher that is never stored, as it differs from epoch to epoch, is
        standardised by the features seen so far.

        Args:
            representations: With or without a cache.

        Returns:
            Whether it was fitted. If not, features are standardised by those seen so far.
        """
        own, cache = self._standardizations(), representations.cache
        if cache is None or not own:
            return False
        store, lack = cache.store, ""
        if store is None:
            lack = "is not there yet"
        elif missing := int((~store.is_valid()).sum()):
            lack = f"lacks {missing} of {store.num_samples} samples"
        if store is None or lack:
            warnings.warn(
                f"the store at {cache.path} {lack}: this "
                "training standardises the teachers' features by the batches seen so far, without a "
                "rotation, and not by those of all images; fill it first: python -m mvmr_loss.cache "
                "fill, or mvmr_loss.cache.fill.",
                stacklevel=2,
            )
            return False
        for name in own.keys() & store.widths.keys():
            own[name].fit(stored_features(store, name))
        return True

    def split(self, features: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Splits a batch's representations into the teachers' and the others.

        Args:
            features: Name -> tensor, of every teacher at least.

        Returns:
            The teachers' features, for this loss, and the others, for :class:`mvmr_loss.MVMRLoss`.

        Raises:
            ValueError: If a teacher is missing.
        """
        missing = [name for name in self.teacher_dims if name not in features]
        if missing:
            raise ValueError(
                f"features must have {missing[0]!r}, which teacher_dims names, but have "
                f"{', '.join(map(repr, features)) or 'nothing'}."
            )
        teachers = {name: features[name] for name in self.teacher_dims}
        others = {name: value for name, value in features.items() if name not in teachers}
        return self._checked(teachers), others

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], teachers: Mapping[str, Tensor]
    ) -> Tensor:
        """Computes the loss.

        Args:
            embeddings: The student's, of shape (N, D), N >= 2, or a list of them, one a view.
            teachers: Name -> features of the images, shape (N, E) or (N, ...), which is flattened.

        Returns:
            Scalar tensor.

        Raises:
            TypeError: If an input is no floating-point tensor, or ``teachers`` no mapping.
            ValueError: If shapes or names do not fit, or, on a CPU, a value is not finite.
        """
        return self.forward_components(embeddings, teachers).total

    def forward_components(
        self, embeddings: Tensor | Sequence[Tensor], teachers: Mapping[str, Tensor]
    ) -> LossComponents:
        """Computes each term, ``regression/NAME`` and ``dependence/NAME``; as :meth:`forward`."""
        named = named_views("embeddings", embeddings)
        views = list(named.values())
        teachers = {name: y.detach() for name, y in self._checked(teachers).items()}
        for label, view in named.items():
            check_batch(label, view)
            count = len(views[0])
            if view.shape != (count, self.embedding_dim):
                raise ValueError(
                    f"{label} must have shape ({count}, {self.embedding_dim}), as all views, but has "
                    f"shape {tuple(view.shape)}."
                )
        for name, y in teachers.items():
            if len(y) != count:
                raise ValueError(
                    f"teachers[{name!r}] must have shape ({count}, ...), one row for each "
                    f"embedding, but has shape {tuple(y.shape)}."
                )
        terms: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        own = self._standardizations().items()
        standardized = {name: standardize(teachers[name]) for name, standardize in own}
        for name, regression in self.regressions.items():
            terms[f"regression/{name}"] = regression(views, standardized[name], standardized=True)
            weights[f"regression/{name}"] = self._regression_weight[name]
        if any(self._dependence_weight.values()):
            # One scale for all coordinates changes no distance correlation.
            features = standardized if self.scale == "coordinate" else teachers
            for name, term in self._dependence_terms(views, features).items():
                terms[f"dependence/{name}"] = term
                weights[f"dependence/{name}"] = abs(self._dependence_weight[name])
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        called = {f"teachers[{name!r}]": y for name, y in teachers.items()}
        check_finite_by(total, {**named, **called})
        return LossComponents(total, terms, weights)

    def _met(
        self, views: list[Tensor], teachers: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Returns the embeddings and the features as the dependence compares them."""
        if self.directions:
            views = [unit_length(view) for view in views]
            teachers = {k: unit_length(as_rows(y)) for k, y in teachers.items()}
        if self.stacked:
            teachers = {name: torch.cat([y] * len(views)) for name, y in teachers.items()}
            views = [torch.cat(views)]
        return views, teachers

    @torch.no_grad()
    def update(self, embeddings: Tensor | Sequence[Tensor], teachers: Mapping[str, Tensor]) -> None:
        """Adds a batch to the bank of anchors, if there is one: once a step, after the loss.

        Of several views, the first one's embeddings are kept. With ``gather_distributed``, every
        process adds the batch of all.

        Args:
            embeddings: As of :meth:`forward`.
            teachers: As of :meth:`forward`.
        """
        if self.bank is None:
            return
        first = next(iter(named_views("embeddings", embeddings).values()))
        teachers = self._checked(teachers)
        if self.gather_distributed:
            tensors, _ = gather(
                {"embeddings": first, **{f"teacher {k}": v for k, v in teachers.items()}}
            )
            first = tensors["embeddings"]
            teachers = {name: tensors[f"teacher {name}"] for name in teachers}
        self.bank.update(first, teachers)

    def extra_repr(self) -> str:
        """Returns the weights, for printing."""
        return (
            f"regression_weight={self._regression_weight}, dependence_weight={self._dependence_weight}, "
            f"gather_distributed={self.gather_distributed}"
        )

    def _dependence_terms(
        self, views: list[Tensor], teachers: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns each teacher's dependence term."""
        embeddings, teachers = self._met(views, teachers)
        batch = checked_batch(
            named_views("embeddings", embeddings),
            teachers,
            self._dependence_weight,
            self.measure,
            argument="teachers",
            gather_distributed=self.gather_distributed,
        )
        # Views of one image say nothing of relations between images.
        images = len(next(iter(batch.views.values()))) * len(embeddings) // len(views)
        if images < self.measure.min_samples:
            raise ValueError(
                f"embeddings must be of at least {self.measure.min_samples} images, whose relations the "
                f"dependence compares, but are of {images}; use a larger batch."
            )
        if self.bank is None:
            met = {name: [(v, batch.labels[name]) for v in batch.views] for name in teachers}
            return dependence_terms(self.measure, batch, met, self._dependence_weight)
        kept, kept_teachers = self.bank.samples()
        if self.scale == "coordinate":
            for name, standardization in self._standardizations().items():  # counted when they came
                kept_teachers[name] = standardization.apply_statistics(kept_teachers[name])
        (kept,), kept_teachers = self._met([kept], kept_teachers)
        views = list(batch.views.values())
        distances = [CenteredDistances.of(z, torch.cat([z, kept.to(z)])) for z in views]
        terms = {name: views[0].new_zeros(()) for name in teachers}
        for name in (name for name, weight in self._dependence_weight.items() if weight != 0):
            y = as_rows(batch.named[batch.labels[name]])
            features = CenteredDistances.of(y, torch.cat([y, kept_teachers[name].to(y)]))
            value = torch.stack([z.correlation(features, rooted=True) for z in distances]).mean()
            value = value.to(views[0].dtype)
            terms[name] = 1 - value if self._dependence_weight[name] > 0 else value
        return terms

    def _by_name(
        self, argument: str, weights: Weights, minimum: float = -math.inf
    ) -> dict[str, float]:
        """Returns a weight for each teacher."""
        checked = check_weights(argument, weights)
        if not isinstance(checked, dict):
            checked = dict.fromkeys(self.teacher_dims, checked)
        if set(checked) != set(self.teacher_dims):
            raise ValueError(
                f"{argument} must have the names of teacher_dims, {', '.join(self.teacher_dims)}, "
                f"but has {', '.join(checked)}."
            )
        for name, weight in checked.items():
            if weight < minimum:
                raise ValueError(
                    f"{argument} must be at least {minimum} but is {weight} for {name}."
                )
        return {name: checked[name] for name in self.teacher_dims}

    def _checked(self, teachers: Any) -> dict[str, Tensor]:
        """Returns every teacher's features in the order of ``teacher_dims``."""
        if not isinstance(teachers, Mapping):
            raise TypeError(
                "teachers must be a mapping from name to features but is a "
                f"{type(teachers).__name__}."
            )
        if set(teachers) != set(self.teacher_dims):
            raise ValueError(
                f"teachers must be {', '.join(self.teacher_dims)} but are "
                f"{', '.join(map(str, teachers)) or 'none'}; split() takes them out of others."
            )
        for name, width in self.teacher_dims.items():
            check_batch(f"teachers[{name!r}]", teachers[name])
            if teachers[name][0].numel() != width:
                raise ValueError(
                    f"teachers[{name!r}] must have shape (N, {width}), as teacher_dims says, but has "
                    f"shape {tuple(teachers[name].shape)}."
                )
        return {name: teachers[name] for name in self.teacher_dims}


def _check_not_all_0(regression: Mapping[str, float], dependence: Mapping[str, float]) -> None:
    if not any([*regression.values(), *dependence.values()]):
        raise ValueError("regression_weight and dependence_weight must not all be 0.")

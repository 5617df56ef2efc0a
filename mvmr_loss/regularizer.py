"""The representation terms of MV-MR alone, for the loss of any other method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mvmr_loss._checks import check_bool
from mvmr_loss._objective import (
    LossComponents,
    Measure,
    Meetings,
    Weights,
    check_weights,
    checked_batch,
    components,
    dependence_terms,
    measure_of_batch,
    named_views,
)


class MultiRepresentationRegularizer(nn.Module):
    """The representation terms of MV-MR alone: dependence of any embeddings on representations.

    Computes the sum over k of ``w_k (1 - dependence(z, y_k))`` for ``w_k >= 0``. A negative weight
    rewards independence instead: it adds ``|w_k| dependence(z, y_k)``, as the authors' release does.
    The embeddings may come from any method: add the result to the loss of VICReg, SimCLR or a
    supervised one. Nothing is normalised over several representations: each brings its full weight.

    Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130), the multi-representation terms.

    Args:
        weights: One weight for all representations, or one per name. Signed; 0 leaves a term out.
        dependence_measure: A name, a mapping with a ``name`` and options, or a measure, see
            :func:`mvmr_loss.dependence.dependence_measure`.
        gather_distributed: If True, embeddings and representations of all processes are gathered,
            with gradient, by their names. No effect where no process group is initialised.

    Raises:
        TypeError: If a weight is not a number or the measure is of no known form.
        ValueError: If a weight is not finite or the measure's name is unknown.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> z, pixels = torch.randn(8, 16), torch.randn(8, 3, 4, 4)
        >>> regularizer = MultiRepresentationRegularizer(dependence_measure="u_distance_correlation_sqr")
        >>> regularizer(z, {"itself": z, "pixels": pixels}).shape
        torch.Size([])
        >>> bool(regularizer(z, {"itself": z}).abs() < 1e-5)
        True
    """

    def __init__(
        self,
        weights: Weights = 1.0,
        *,
        dependence_measure: Measure = "distance_correlation",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.weights = check_weights("weights", weights)
        self.measure = measure_of_batch("dependence_measure", dependence_measure)
        self.gather_distributed = check_bool("gather_distributed", gather_distributed)

    def extra_repr(self) -> str:
        """Returns the arguments, for printing."""
        return f"weights={self.weights}, gather_distributed={self.gather_distributed}"

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], representations: Mapping[str, Tensor]
    ) -> Tensor:
        """Computes the sum of the weighted representation terms.

        Args:
            embeddings: Embeddings of shape (N, D), or a list of them, one a view; each term is then
                the mean over views.
            representations: Name -> tensor of shape (N, ...), which is flattened; not empty.

        Returns:
            Scalar tensor.

        Raises:
            TypeError: If an input is not a floating-point tensor or ``representations`` no mapping.
            ValueError: If shapes or names do not fit, or, on a CPU, a value is not finite.
        """
        return self.forward_components(embeddings, representations).total

    def forward_components(
        self, embeddings: Tensor | Sequence[Tensor], representations: Mapping[str, Tensor]
    ) -> LossComponents:
        """Computes each representation term; arguments and errors as of :meth:`forward`."""
        named = named_views("embeddings", embeddings)
        if representations == {}:
            raise ValueError("representations must not be empty but is {}.")
        batch = checked_batch(
            named,
            representations,
            self.weights,
            self.measure,
            gather_distributed=self.gather_distributed,
        )
        met: Meetings = {}
        for term, label in zip(batch.weights, batch.labels.values(), strict=True):
            met[term] = [(view, label) for view in batch.views]
        terms = dependence_terms(self.measure, batch, met, batch.weights)
        return components(terms, batch.weights, batch)

"""The dependence measures by name, with options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mvmr_loss.dependence.distance_correlation import distance_estimator
from mvmr_loss.dependence.hsic import Kernel, kernel_estimator
from mvmr_loss.dependence.measures import DependenceMeasure, MatrixMeasure

_REGISTRY: dict[str, Callable[..., DependenceMeasure]] = {}

M = TypeVar("M", bound=Callable[..., DependenceMeasure])


def register_dependence_measure(name: str) -> Callable[[M], M]:
    """Registers a dependence measure under a name, as a decorator of its class.

    Args:
        name: The name by which the loss and configuration files know it.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        ValueError: If the name is empty or taken.

    Examples:
        >>> import torch
        >>> from mvmr_loss.dependence import DependenceMeasure
        >>> @register_dependence_measure("mean_product")
        ... class MeanProduct(DependenceMeasure):
        ...     def forward(self, x, y):
        ...         return (x.flatten(1).mean(1) * y.flatten(1).mean(1)).mean()
        >>> dependence_measure("mean_product")(torch.ones(4, 2), torch.ones(4, 3))
        tensor(1.)
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a non-empty string but is {name!r}.")

    def register(measure: M) -> M:
        taken = _REGISTRY.get(name)
        if taken is not None and _place(taken) != _place(measure):
            raise ValueError(f"name must be free but {name!r} is taken; choose another name.")
        _REGISTRY[name] = measure
        return measure

    return register


def _place(measure: Any) -> tuple[str, str]:
    return measure.__module__, getattr(measure, "__qualname__", repr(measure))


def list_dependence_measures() -> list[str]:
    """Returns the names of all dependence measures.

    Examples:
        >>> "distance_correlation" in list_dependence_measures()
        True
    """
    return list(_REGISTRY)


def dependence_measure(
    measure: str | Mapping[str, Any] | DependenceMeasure, **options: Any
) -> DependenceMeasure:
    """Returns the dependence measure of a name.

    The names are ``distance_correlation`` (the paper's), ``distance_correlation_sqr``,
    ``u_distance_correlation_sqr`` (bias-corrected), ``distance_covariance``,
    ``distance_covariance_sqr``, ``u_distance_covariance_sqr``, with the options ``exponent``, ``eps``
    and ``block_size``; ``hsic`` and ``unbiased_hsic``, ``cka`` and ``debiased_cka``, with ``kernel``
    and ``bandwidth``; and those registered. The functions of these names say what they compute.
    ``block_size`` bounds the rows of a distance matrix that exist at once: memory grows as N x
    block_size, and the gradient computes the distances again; it knows no vmap and no forward
    derivative, which all the others do.

    Args:
        measure: A name; or a mapping with a ``name`` and options, as read from a configuration file;
            or a measure, which is returned as it is.
        **options: Options of the measure of a name.

    Returns:
        The measure.

    Raises:
        TypeError: If ``measure`` is of another form, or an option unknown or of a wrong type.
        ValueError: If no measure has that name, or an option is out of range.

    Examples:
        >>> dependence_measure("distance_correlation", exponent=0.5)
        MatrixMeasure(distance_correlation, exponent=0.5, eps=0.0)
        >>> dependence_measure({"name": "hsic", "kernel": "gaussian", "bandwidth": 8})
        MatrixMeasure(hsic, bandwidth=8.0)
    """
    return measure_of("dependence_measure", measure, options)


def measure_of(
    argument: str,
    measure: str | Mapping[str, Any] | DependenceMeasure,
    options: Mapping[str, Any] | None = None,
) -> DependenceMeasure:
    """Returns what :func:`dependence_measure` does; errors speak of an argument of that name."""
    options = dict(options or {})
    if isinstance(measure, DependenceMeasure):
        if options:
            raise TypeError(f"options must be of a name but {measure} is a measure already.")
        return measure
    name: Any = measure
    if isinstance(measure, Mapping):
        options = {**measure, **options}
        name = options.pop("name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"{argument} must be a name, a mapping with a 'name', or a "
            f"mvmr_loss.dependence.DependenceMeasure but is {measure!r}."
        )
    if name not in _REGISTRY:
        raise ValueError(
            f"{argument} must be one of {', '.join(_REGISTRY)} but is {name!r}; one's own "
            "is added with mvmr_loss.register_dependence_measure."
        )
    known = inspect.signature(_REGISTRY[name]).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for option in options:
            if option not in known:
                raise TypeError(
                    f"{name} has no option {option!r}; its options are "
                    f"{', '.join(known) or 'none'}."
                )
    return _REGISTRY[name](**options)


def _distance_measure(name: str, **choices: bool) -> Callable[..., DependenceMeasure]:
    def build(
        *, exponent: float = 1.0, eps: float = 0.0, block_size: int | None = None
    ) -> DependenceMeasure:
        estimator = distance_estimator(exponent=exponent, eps=eps, **choices)
        return MatrixMeasure(name, estimator, block_size)

    return build


def _kernel_measure(
    name: str, default: Kernel, *, corrected: bool, normalized: bool
) -> Callable[..., DependenceMeasure]:
    def build(*, kernel: Kernel = default, bandwidth: float | None = None) -> DependenceMeasure:
        estimator = kernel_estimator(kernel, bandwidth, corrected=corrected, normalized=normalized)
        return MatrixMeasure(name, estimator)

    return build


_REGISTRY |= {
    name: _distance_measure(name, **choices)
    for name, choices in {
        "distance_correlation": {"rooted": True},
        "distance_correlation_sqr": {},
        "u_distance_correlation_sqr": {"corrected": True},
        "distance_covariance": {"normalized": False, "rooted": True},
        "distance_covariance_sqr": {"normalized": False},
        "u_distance_covariance_sqr": {"normalized": False, "corrected": True},
    }.items()
}
_REGISTRY |= {
    "hsic": _kernel_measure("hsic", "gaussian", corrected=False, normalized=False),
    "unbiased_hsic": _kernel_measure("unbiased_hsic", "gaussian", corrected=True, normalized=False),
    "cka": _kernel_measure("cka", "linear", corrected=False, normalized=True),
    "debiased_cka": _kernel_measure("debiased_cka", "linear", corrected=True, normalized=True),
}

"""MV-MR in solo-learn: ``method: mvmr`` and the representation regulariser for any other method.

An unmodified checkout of solo-learn finds both through a Hydra plugin where this package is
installed, and through ``python -m mvmr_loss.adapters.solo main_pretrain.py ...`` everywhere.

Importing this module imports nothing of solo-learn; :func:`register` and :class:`MVMR` do.

Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import SoloConfigError
from .registration import register

if TYPE_CHECKING:
    from .method import MVMR
    from .regularizer import RepresentationRegularized

__all__ = ["MVMR", "RepresentationRegularized", "SoloConfigError", "register"]


def __getattr__(name: str) -> Any:
    """Imports what subclasses solo-learn's classes only when it is asked for."""
    if name not in ("MVMR", "RepresentationRegularized"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .registration import check_solo

    check_solo()
    from . import method, regularizer

    return method.MVMR if name == "MVMR" else regularizer.RepresentationRegularized

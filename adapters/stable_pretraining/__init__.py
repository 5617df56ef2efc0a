"""MV-MR in stable-pretraining: forward functions for its ``Module``.

They are functions ``(self, batch, stage)``, as those in ``stable_pretraining.forward`` are, and read
their parts from the module: ``Module(forward=mvmr, backbone=..., projector=..., loss=...,
representations=...)``. In a YAML file ``forward`` is the function's dotted path. Nothing of the host is
imported.

Source: MV-MR, Entropy 26(6):466, 2024 (arXiv 2303.12130).
"""

from .forward import distill, mvmr, regularized

__all__ = ["distill", "mvmr", "regularized"]

"""Frozen networks as representations: knowledge distillation from any teacher, of any width.

A :class:`Teacher` is a representation like the others, under the name ``teacher``: its features of
the non-augmented view go into the loss with the rest, or alone, or through a cache. ::

    Representations([{"name": "teacher", "source": "open_clip", "model": "ViT-B-16",
                      "weights": "laion400m_e32"}])
"""

from __future__ import annotations

from mvmr_loss.teachers.checkpoints import load_checkpoint
from mvmr_loss.teachers.preprocessing import IMAGENET_MEAN, IMAGENET_STD, TeacherPreprocessing
from mvmr_loss.teachers.teacher import Teacher

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Teacher", "TeacherPreprocessing", "load_checkpoint"]

"""Distillation of a teacher into a small student: MV-MR's and its peers', at an equal budget."""

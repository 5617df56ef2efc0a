"""Configurations for torchdistill."""

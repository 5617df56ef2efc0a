"""Configurations for solo-learn's scripts, which Hydra finds through the plugin."""

"""Benchmarks of mvmr_loss, one folder a question; run from the repository's root."""

"""Examples of mvmr_loss, run from the repository's root: ``python -m examples.plain_pytorch``."""

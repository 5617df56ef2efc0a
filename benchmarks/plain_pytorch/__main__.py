"""Runs one training: ``python -m benchmarks.plain_pytorch``."""

from benchmarks.plain_pytorch.training import main

if __name__ == "__main__":
    main()

"""What the benchmarks share: images, a small encoder, evaluation and result files."""

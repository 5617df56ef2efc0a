"""What the examples and benchmarks share: images, a small encoder, evaluation and result files."""

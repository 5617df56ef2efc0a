"""What the example in plain PyTorch reaches, over seeds and settings of the loss."""

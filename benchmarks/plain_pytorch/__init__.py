"""What a plain PyTorch loop reaches, over seeds and settings of the loss."""

"""What a store of representations costs and changes: time, size, loss values and accuracy."""

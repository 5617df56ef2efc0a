"""How fast the loss and the representations are, beside every peer, in one run."""

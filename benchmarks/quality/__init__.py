"""Does it learn better? The presets of the loss beside other methods, at equal budget."""

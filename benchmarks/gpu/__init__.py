"""All that is measured on a GPU, in one command that leaves JSON part by part."""

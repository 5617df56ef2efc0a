"""Configurations for ``spt run``: each trains on a folder of images, one sub-folder a class."""

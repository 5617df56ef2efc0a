"""Configurations for stable-pretraining: a folder of images, one sub-folder a class."""

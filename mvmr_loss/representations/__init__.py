"""Fixed representations of the non-augmented view: a function and a module each."""

from mvmr_loss.representations.augmented_pixels import AugmentedPixels, augmented_pixels
from mvmr_loss.representations.base import Representation
from mvmr_loss.representations.collection import Representations
from mvmr_loss.representations.dct import DCT, dct
from mvmr_loss.representations.hog import HOG, hog
from mvmr_loss.representations.local_binary_patterns import (
    LocalBinaryPatterns,
    local_binary_patterns,
)
from mvmr_loss.representations.local_std import LocalStd, local_std
from mvmr_loss.representations.patch_scattering import PatchScattering, patch_scattering
from mvmr_loss.representations.pixels import Pixels
from mvmr_loss.representations.registry import list_representations, register_representation
from mvmr_loss.representations.scattering import Scattering, scattering
from mvmr_loss.representations.scattering2d import Scattering2D
from mvmr_loss.representations.sketch import FoldedSignSketch, folded_sign_sketch

__all__ = [
    "DCT",
    "HOG",
    "AugmentedPixels",
    "FoldedSignSketch",
    "LocalBinaryPatterns",
    "LocalStd",
    "PatchScattering",
    "Pixels",
    "Representation",
    "Representations",
    "Scattering",
    "Scattering2D",
    "augmented_pixels",
    "dct",
    "folded_sign_sketch",
    "hog",
    "list_representations",
    "local_binary_patterns",
    "local_std",
    "patch_scattering",
    "register_representation",
    "scattering",
]

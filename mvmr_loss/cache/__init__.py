"""Representations computed once per image, kept on disk, and read back by sample index.

A representation of the non-augmented view never changes during training.
``Representations(..., cache=...)`` computes each image's once, during the first epoch or ahead of the
training with :func:`fill` or ::

    python -m mvmr_loss.cache fill STORE --data FOLDER --image-size 96 \
        --representations pixels scattering hog local_std --sketch-dim 1024

and reads it back afterwards. ``verify STORE`` checks every row, ``info STORE`` tells what is in it.

A store is a folder of three files and a lock:

========================  ==========================================================================
``metadata.json``         what the columns are, of which images, and a checksum of all this
``rows.bin``              a row per sample: a block of numbers per representation; one row more than
                          samples, which holds the representations of a fixed test image
``index.bin``             8 bytes per row: 0 where the row is missing, else a mark and the CRC-32 of
                          the row, started from its number
========================  ==========================================================================

A row's entry in the index is written after the row itself is on disk, so a row is whole or missing,
whenever a process is killed; and every row that is read is compared with its checksum. Nothing is
unpickled.
"""

from mvmr_loss.cache.dataset import IndexedDataset, dataset_fingerprint, fill
from mvmr_loss.cache.files import CorruptCacheError
from mvmr_loss.cache.rows import CachedRows
from mvmr_loss.cache.store import RepresentationCache

__all__ = [
    "CachedRows",
    "CorruptCacheError",
    "IndexedDataset",
    "RepresentationCache",
    "dataset_fingerprint",
    "fill",
]

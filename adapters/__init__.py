"""MV-MR inside other frameworks; each adapter imports its host, and nothing else does.

Here are the defaults that all hosts share.
"""

# The five that the authors' release trains with.
PAPER_REPRESENTATIONS = ("pixels", "augmented_pixels", "scattering", "hog", "local_std")

# Where a host trains in several processes, the loss is that of the whole batch unless told
# otherwise: with it, a batch means the same on one device and on eight.
GATHER_DISTRIBUTED = True

"""MV-MR inside other frameworks; each adapter imports its host, and nothing else does."""

"""What pytest must not import when it looks for doctests."""

from __future__ import annotations

# They subclass solo-learn's classes, and a checkout of solo-learn is on no path here.
collect_ignore = ["adapters/solo/method.py", "adapters/solo/regularizer.py"]

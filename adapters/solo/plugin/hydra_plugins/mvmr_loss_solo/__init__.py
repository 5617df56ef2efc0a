"""Adds MV-MR to solo-learn when Hydra starts one of its scripts.

Hydra loads this file in every program that it starts in this environment: in those where
solo-learn's methods are not already imported, it does nothing and imports nothing.
"""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MVMRSearchPathPlugin(SearchPathPlugin):
    """Adds the method ``mvmr``, and the shipped configurations at the end of the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds MV-MR if the program is one of solo-learn's.

        Args:
            search_path: Where Hydra looks for configurations.
        """
        methods = sys.modules.get("solo.methods")
        if methods is None or not hasattr(methods, "METHODS"):
            return
        # Not at the top, for it imports torch.
        from mvmr_loss.adapters.solo import register  # type: ignore[import-not-found]

        register("its Hydra plugin")
        search_path.append(provider="mvmr-loss", path="pkg://mvmr_loss.adapters.solo.configs")

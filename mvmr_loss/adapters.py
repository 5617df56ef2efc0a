"""The adapters of a checkout, where they lie beside this package; installed, they are in it.

Without this file an editable installation of one checkout would give its adapters to all others.
"""

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).resolve().parents[1] / "adapters" / "__init__.py"
_spec = importlib.util.spec_from_file_location(__name__, _FILE)
if _spec is None or _spec.loader is None or not _FILE.is_file():
    raise ModuleNotFoundError(f"{__name__} must be in {_FILE.parent} but is not.", name=__name__)
# What stands here when the import ends is what is imported.
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])

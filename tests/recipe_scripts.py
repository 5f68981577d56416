"""The scripts beside the package, of recipes and benchmarks, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ORGANISMS = ROOT / "recipes" / "organisms"


def script(path: Path) -> Any:
    """A script as a module; it finds those beside it, as it does when it is run."""
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))

"""What is shipped beside the package: `models/` and `device_profiles/`, found where they lie, even where a folder of the user's has the same name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
"""What the package and its neighbours lie in: a checkout, or site-packages."""
OURS = "partition-planner"
"""The distribution's name."""


def shipped(name: str) -> ModuleType:
    """A module of `models`, such as "models.llama". Where `models` is a package of somebody else's, ours is loaded as `partition_models`."""
    top, _, rest = name.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None or str(ROOT / top) not in map(str, spec.submodule_search_locations or ()):
        alias = f"partition_{top}"
        if alias not in sys.modules:
            own = importlib.util.spec_from_file_location(alias, ROOT / top / "__init__.py", submodule_search_locations=[str(ROOT / top)])
            assert own is not None and own.loader is not None
            sys.modules[alias] = importlib.util.module_from_spec(own)
            own.loader.exec_module(sys.modules[alias])
        top = alias
    return importlib.import_module(f"{top}.{rest}" if rest else top)

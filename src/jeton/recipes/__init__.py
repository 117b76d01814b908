"""Training recipes: one file per system that learns, named by its id.

A recipe's docstring says what it trains on, what that costs and what comes out, as measured. It has one function,
`run(out, resume=False, progress=True)`, which trains with `jeton.train`, writes weights and results into the folder `out` and
returns what it measured as plain data. `jeton train` lists and runs them.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any


def names() -> list[str]:
    """The systems that have a recipe."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def recipe(name: str) -> ModuleType:
    """The recipe of one system; an unknown name suggests the nearest."""
    if name not in names():
        raise ValueError(f"there is no recipe for {name!r}; `jeton train` lists them.")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def run(name: str, out: str | Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train one system by its recipe, into a folder; returns what was measured."""
    return recipe(name).run(Path(out), resume=resume, progress=progress)

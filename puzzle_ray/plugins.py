"""One file is one plugin: every public module of a folder is loaded, no list to edit; a user's own comes by dotted path."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Imports every public module of a package, in the order of their names."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'gqa'? known: ...` for an error's last words."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)

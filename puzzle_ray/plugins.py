"""One file is one plug-in: every public module of a folder is looked at, no list to edit; a user's own comes by dotted path."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def declared(package: str, attribute: str) -> list[Any]:
    """What the public modules of `package` declare as `attribute`, in the order of the modules' names; others may stand beside them."""
    folder = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.iter_modules(folder.__path__) if not info.name.startswith("_"))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [getattr(module, attribute) for module in modules if hasattr(module, attribute)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'gqa'? known: ...` for an error's last words."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)

"""One file is one plug-in: every public module of a folder is looked at, no list to edit; a user's own comes by dotted path."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puzzle_ray.errors import ConfigError

PACKAGE = Path(__file__).parent


def declared(package: str, attribute: str) -> list[Any]:
    """What the public modules of `package` declare as `attribute`, in the order of the modules' names; others may stand beside them."""
    folder = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.iter_modules(folder.__path__) if not info.name.startswith("_"))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [getattr(module, attribute) for module in modules if hasattr(module, attribute)]


def plugin_source(name: str, plugin: object, *, where: str, module_name: str = "") -> dict[str, str]:
    """What identifies a plug-in that is not of this package: `{"plug-in <name>": <hash of its source>}`. Nothing for one of ours.

    Two files are hashed: that of the module which the config names, by `package.module:ATTRIBUTE` or by the entry point's `module_name`,
    and that of the plug-in's class, where both are of one package. What these import is not looked at. A file beside those of this
    package is one of ours. Raises ConfigError where a module has no file.
    """
    named = module_name or (name.partition(":")[0] if ":" in name else "")
    own = (plugin if isinstance(plugin, type) else type(plugin)).__module__
    modules = {named or own} | ({own} if own.partition(".")[0] == named.partition(".")[0] else set())
    digest = hashlib.sha256()
    foreign = False
    for module in sorted(modules):
        file = Path(getattr(sys.modules[module], "__file__", None) or "").resolve()
        if file.is_relative_to(PACKAGE):
            continue
        if not file.is_file():
            problem = f"the module {module} of {name!r} has no file, so that nothing tells when it changes"
            raise ConfigError(where, problem, "put it in a file of its own")
        foreign = True
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return {f"plug-in {name}": digest.hexdigest()} if foreign else {}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'gqa'? known: ...` for an error's last words."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)

"""`import puzzle_ray` makes children known to transformers, so that they load without `trust_remote_code`.

Nothing is imported for it: a finder waits until transformers' own Auto classes are imported, and registers the configs, then the models
of children. Modules import each other, so it waits until none of transformers' and of this package's is still on its way.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_LIBRARY, _OWN = "transformers", "puzzle_ray"
_CONFIGS = f"{_LIBRARY}.models.auto.configuration_auto"
_MODELS = f"{_LIBRARY}.models.auto.modeling_auto"


def register_when_transformers_is_imported() -> None:
    """Registers children now if transformers' classes are there already, otherwise as soon as they are."""
    if not _register(_OWN) and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _watched(name: str) -> bool:
    return name.partition(".")[0] in (_LIBRARY, _OWN)


def _on_its_way(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _register(ended: str = "") -> bool:
    """Registers what can be, and says whether that is all. `ended` is the module whose import has just come to its end."""
    if _CONFIGS not in sys.modules:
        return False
    if any(_watched(name) and name != ended and _on_its_way(module) for name, module in list(sys.modules.items())):
        return False
    from puzzle_ray.models.child_configs import register_configs

    register_configs()
    if _MODELS not in sys.modules:
        return False
    from puzzle_ray.models.child_classes import register_children

    register_children()
    return True


class _Finder(MetaPathFinder):
    """Finds the modules as everyone else does, and watches their import."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not _watched(name) or self not in sys.meta_path:
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(place, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, self)
        return spec


class _Watched(Loader):
    """A module's own loader, and what follows its import."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        finder = self._finder
        if finder in sys.meta_path and _register(module.__name__):
            sys.meta_path.remove(finder)

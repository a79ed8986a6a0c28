"""One file is one plug-in: every public module of a folder is looked at, no list to edit; a user's own comes by dotted path.

What a user's own plug-in raises, at import or in one of its functions, becomes a PluginError: one line with file and line.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from puzzle_ray.errors import ConfigError, PluginError, PuzzleError

PACKAGE = Path(__file__).parent
MOST_NAMED = 100  # names in one error
NEAREST = 5  # of more


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
    plugin = plugin._plugin if isinstance(plugin, Foreign) else plugin
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
    """`did you mean 'gqa'? known: ...` for an error's last words. Of very many known names, as lm_eval's tasks are, the nearest."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=NEAREST)
    asked = f"did you mean {close[0]!r}? " if close else ""
    if len(known) <= MOST_NAMED:
        return asked + "known: " + ", ".join(known)
    return f"{asked}known: {', '.join([*close, f'{len(known) - len(close)} more' if close else f'{len(known)} names'])}"


def load_plugin(path: str, where: str, role: str) -> Any:
    """A user's own object at `package.module:ATTRIBUTE`; `role` is what it is for, such as `variant`.

    Raises ConfigError where there is none at that path, PluginError where its module cannot be imported for another reason.
    """
    module_name, _, attribute = path.partition(":")
    what, remedy = f"{role} {path}", "write package.module:ATTRIBUTE"
    try:
        with told(what, module_name, "import"):
            module = _imported(module_name)
        found = getattr(module, attribute)
        return found if module_name.startswith("puzzle_ray.") else Foreign(found, what, module_name)
    except (_NoModule, AttributeError, ValueError) as error:
        raise ConfigError(where, f"{role} {path!r} cannot be imported ({error})", remedy) from None


class _NoModule(PuzzleError):
    """There is no module of that name."""


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise _NoModule(str(error)) from None
        raise
    except (ValueError, TypeError) as error:
        if name.strip(".") == "" or name.startswith("."):  # no name of a module
            raise _NoModule(str(error)) from None
        raise


class Foreign:
    """A user's own object. Its attributes are its own; what its functions raise is told by `told`."""

    def __init__(self, plugin: Any, what: str, module: str) -> None:
        self._plugin, self._what, self._module = plugin, what, module

    def __reduce__(self) -> tuple[Any, ...]:
        return Foreign, (self._plugin, self._what, self._module)

    def __getattr__(self, name: str) -> Any:
        if name in ("_plugin", "_what", "_module") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        value = getattr(self._plugin, name)
        return self._told(name, value) if callable(value) else value

    def _told(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with told(self._what, self._module, name):
                return function(*args, **options)

        return call

    def again(self, plugin: Any) -> Foreign:
        """Another object that the same user's code has made."""
        return Foreign(plugin, self._what, self._module)


@contextmanager
def told(what: str, module: str, doing: str) -> Iterator[None]:
    """An exception of a user's code becomes a PluginError. PuzzleErrors stay, and so does a full GPU, which is nobody's fault."""
    try:
        yield
    except PuzzleError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        said = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        trace = "".join(traceback.format_exception(error))
        raise PluginError(what, doing, reason, _place(error, module), trace) from error


def _place(error: BaseException, module: str) -> str:
    """`folder/file.py:31`: the last line of the user's own code that the error went through."""
    lines = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno or 0))
    top = sys.modules.get(module.partition(".")[0])
    folders = [Path(folder) for folder in getattr(top, "__path__", ())] or [Path(str(getattr(top, "__file__", None) or module))]
    own = [(file, line) for file, line in lines if any(Path(file).is_relative_to(folder) for folder in folders)]
    others = [(file, line) for file, line in lines if not file.startswith("<") and Path(file) != Path(__file__)]
    file, line = (own or others or lines)[-1]
    for folder in folders:
        if Path(file).is_relative_to(folder.parent):
            return f"{Path(file).relative_to(folder.parent).as_posix()}:{line}"
    return f"{file}:{line}"

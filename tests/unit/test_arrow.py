"""puzzle_ray <- actors <- jobs: imports point down, nothing runs in a circle, and importing the library is quiet and light.

Every import counts, wherever it stands: at the top, inside a function, or for types alone.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ALLOWED = {
    "puzzle_ray": {"puzzle_ray"},
    "actors": {"puzzle_ray", "actors", "ray"},
    "jobs": {"puzzle_ray", "actors", "jobs", "ray"},
}
GUARDED = {"puzzle_ray", "actors", "jobs", "tests", "benchmarks", "ray"}
SOURCES = sorted(path.relative_to(ROOT) for top in ALLOWED for path in (ROOT / top).rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
    """`a/b/c.py` is module `a.b.c`; `a/b/__init__.py` is `a.b`."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imported(path: pathlib.Path) -> Iterator[tuple[str, ...]]:
    """What each import of a file may mean, the longest name first: in `from a import b`, `b` is a module or something in `a`."""
    package = path.parent.parts
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()  # of a relative import
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((f"{base}.{alias.name}", base) for alias in node.names)


def imported_modules(module: str, modules: Mapping[str, pathlib.Path] = MODULES) -> set[str]:
    """The modules here that a module imports: those it names, and the `__init__` of every package on the way to them.

    The packages that the module itself lies in are there before it; they count where it names them.
    """
    own_packages = {module[:n] for n, character in enumerate(module) if character == "."}
    found: set[str] = set()
    for names in imported(modules[module]):
        named = next((name for name in names if name in modules), None)
        if named is not None:
            packages = {named[:n] for n, character in enumerate(named) if character == "."}
            found |= {named} | (packages - own_packages)
    return found - {module}


def folder_of(module: str) -> str:
    """The folder a module lies in. A module directly in `puzzle_ray`, `actors` or `jobs` stands for itself."""
    is_package = MODULES[module].name == "__init__.py"
    return module if is_package or module.count(".") == 1 else module.rpartition(".")[0]


def circle_in(graph: Mapping[str, set[str]]) -> str:
    """One circle, in words; nothing for nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_down(path):
    names = {name for names in imported(path) for name in names}
    assert {name.split(".")[0] for name in names} & GUARDED <= ALLOWED[path.parts[0]]
    assert not any(name.startswith("ray._private") for name in names)


def test_no_modules_import_each_other_in_a_circle():
    assert circle_in({module: imported_modules(module) for module in MODULES}) == ""


def test_no_folders_import_each_other_in_a_circle():
    folders: dict[str, set[str]] = {}
    for module in MODULES:
        folder = folder_of(module)
        folders.setdefault(folder, set()).update({folder_of(name) for name in imported_modules(module)} - {folder})
    assert circle_in(folders) == ""


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path, monkeypatch):
    files = {
        "a/__init__.py": "",
        "a/one.py": "def f():\n    from a import two\n",
        "a/two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.b.three\n",
        "a/b/__init__.py": "from . import three\n",
        "a/b/three.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    modules = {module_of(pathlib.Path(name)): pathlib.Path(name) for name in files}

    def graph():
        return {module: imported_modules(module, modules) for module in modules}

    assert graph() == {"a": set(), "a.one": {"a.two"}, "a.two": {"a.b", "a.b.three"}, "a.b": {"a.b.three"}, "a.b.three": set()}
    assert circle_in(graph()) == ""
    (tmp_path / "a/b/three.py").write_text("from ..one import f\n")
    assert set(circle_in(graph()).split(" -> ")) >= {"a.one", "a.two", "a.b.three"}


def test_importing_the_library_loads_neither_torch_nor_ray_and_prints_nothing():
    code = "import sys, puzzle_ray, puzzle_ray.config, puzzle_ray.store; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")

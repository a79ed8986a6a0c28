"""puzzle_ray <- actors <- jobs: imports point down, and importing the library is quiet and light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ALLOWED = {
    "puzzle_ray": {"puzzle_ray"},
    "actors": {"puzzle_ray", "actors", "ray"},
    "jobs": {"puzzle_ray", "actors", "jobs", "ray"},
}
GUARDED = {"puzzle_ray", "actors", "jobs", "tests", "benchmarks", "ray"}
SOURCES = sorted(path.relative_to(ROOT) for top in ALLOWED for path in (ROOT / top).rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_down(path):
    names = imported(path)
    assert {name.split(".")[0] for name in names} & GUARDED <= ALLOWED[path.parts[0]]
    assert not any(name.startswith("ray._private") for name in names)


def test_importing_the_library_loads_neither_torch_nor_ray_and_prints_nothing():
    code = "import sys, puzzle_ray, puzzle_ray.config, puzzle_ray.store; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")

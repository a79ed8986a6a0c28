"""The code in a child's folder: with it transformers loads the child where this package is not installed.

It is made from this package's own modules: what they import from each other is put into one file, word for word. So a child is built by
the same lines with this package and without it. The files are the same for all children of a family.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.version import __version__

_ERRORS = ("PuzzleError", "ConfigError")
_SETTINGS = ("puzzle_ray.models.child_settings",)
SURGERY = (
    "puzzle_ray.families.descriptor",
    "puzzle_ray.surgery.kv_cache",
    "puzzle_ray.surgery.window",
    "puzzle_ray.surgery.subblocks",
    "puzzle_ray.surgery.projections",
    "puzzle_ray.surgery.shapes",
)
_MODEL = ("puzzle_ray.models.child_surgery",)
HEADER = '''"""{about}

Made by puzzle_ray {version} from its own modules, put into one file. Licence: Apache-2.0.
"""
'''
_CONFIG = '''

class {name}(ChildSettings, {base}):
    """The settings of a child of a {family} model."""

    model_type = "puzzle_{family}"

    def __init__(self, **settings):
        super().__init__(**settings)
'''
_CLASSES = '''

DESCRIPTOR = {descriptor}


class {base_name}(ChildLayers, {base}):
    """The model without its head."""

    config_class = {config}
    descriptor = DESCRIPTOR{flags}


class {name}(ChildLayers, {head}):
    """The causal language model."""

    config_class = {config}
    descriptor = DESCRIPTOR{flags}
'''


@dataclasses.dataclass(frozen=True)
class Names:
    """What the classes and files of a family's children are called, and their parent's classes."""

    descriptor: Descriptor
    base: str  # the parent's class without a head

    @classmethod
    def of(cls, descriptor: Descriptor) -> Names:
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        return cls(descriptor, str(MODEL_MAPPING_NAMES[descriptor.model_type]))

    @property
    def config(self) -> str:
        return f"Puzzle{self.descriptor.config_class}"

    @property
    def model(self) -> str:
        return f"Puzzle{self.descriptor.model_class}"

    @property
    def base_model(self) -> str:
        return f"Puzzle{self.base}"

    @property
    def config_module(self) -> str:
        return f"configuration_puzzle_{self.descriptor.model_type}"

    @property
    def model_module(self) -> str:
        return f"modeling_puzzle_{self.descriptor.model_type}"

    @property
    def auto_map(self) -> dict[str, str]:
        """In the order in which vLLM wants to meet the classes."""
        return {
            "AutoConfig": f"{self.config_module}.{self.config}",
            "AutoModel": f"{self.model_module}.{self.base_model}",
            "AutoModelForCausalLM": f"{self.model_module}.{self.model}",
        }


def write_code(folder: Path, descriptor: Descriptor) -> None:
    """Writes the two files that `auto_map` names."""
    names, family = Names.of(descriptor), descriptor.model_type
    imported = [f"from transformers import {descriptor.config_class}"]
    config = _CONFIG.format(name=names.config, base=descriptor.config_class, family=family)
    text = joined(f"The config of a child of a {family} model.", _SETTINGS, imported, config)
    (folder / f"{names.config_module}.py").write_text(text)
    imported = [
        f"from transformers import {descriptor.model_class}, {names.base}",
        f"from .{names.config_module} import {names.config}, words_of_layers",
    ]
    eager = (
        descriptor.attn_implementation == "eager"
    )  # transformers would choose sdpa, which this family's attention does not suit
    classes = _CLASSES.format(
        descriptor=written(descriptor),
        base_name=names.base_model,
        base=names.base,
        name=names.model,
        head=descriptor.model_class,
        config=names.config,
        flags="\n    _supports_sdpa = False" if eager else "",
    )
    text = joined(
        f"A child of a {family} model: its parent's class, with layers of their own shapes.",
        (*SURGERY, *_MODEL),
        imported,
        classes,
    )
    (folder / f"{names.model_module}.py").write_text(text)


def written(descriptor: Descriptor) -> str:
    """A descriptor as code. What refuses parents is left out: a child's parent has passed it."""
    known = {f.name: f.default for f in dataclasses.fields(descriptor)}
    parts = [
        f"    {name}={value!r},"
        for name, value in vars(descriptor).items()
        if name not in ("unsupported", "check") and value != known[name]
    ]
    return "\n".join(("Descriptor(", *parts, ")"))


def joined(about: str, modules: Iterable[str], imported: Iterable[str], rest: str) -> str:
    """One file of some modules of this package, more imports and more code."""
    imports: dict[str, None] = {}
    bodies = []
    for module in modules:
        found, body = _taken_apart(inspect.getsource(importlib.import_module(module)))
        imports |= dict.fromkeys(found)
        bodies.append(body)
    if any("ConfigError" in body for body in bodies):
        bodies.insert(0, _classes("puzzle_ray.errors", _ERRORS))
    head = HEADER.format(about=about, version=__version__)
    lines = ("from __future__ import annotations", "", *sorted(imports), *imported)
    return "\n".join((head, *lines, "", "", "\n\n".join(body.strip("\n") + "\n" for body in bodies))) + rest


def _classes(module: str, names: Iterable[str]) -> str:
    found = importlib.import_module(module)
    return "\n\n".join(inspect.getsource(getattr(found, name)) for name in names)


def _taken_apart(source: str) -> tuple[list[str], str]:
    """The imports of a module from elsewhere than this package, and what is left without imports and docstring."""
    lines, imports, gone = source.splitlines(), [], set[int]()
    for node in _at_the_top(ast.parse(source)):
        gone |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not _ours(node)):
            imports.append(ast.unparse(node))
    return imports, "\n".join(line for i, line in enumerate(lines) if i not in gone).strip("\n")


def _ours(node: ast.ImportFrom) -> bool:
    return str(node.module).partition(".")[0] in ("puzzle_ray", "__future__")


def _at_the_top(tree: ast.Module) -> Iterator[Any]:
    """A module's docstring, its imports, and what is imported for types alone."""
    for index, node in enumerate(tree.body):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, ast.Import | ast.ImportFrom) or for_types or (index == 0 and text):
            yield node

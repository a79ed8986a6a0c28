"""Subblock variants: what an attention or an FFN may become.

A variant is one file here that defines `VARIANT`, an object with the methods of `Variant`; or such an object elsewhere, named by
its dotted path `package.module:ATTRIBUTE` or by an entry point of the group `puzzle_ray.variants`. Its name in a search space is
`<name>` or `<name>:<argument>`, and once resolved against a parent (`gqa:50%` -> `gqa:4`) it is canonical: the same name always
means the same shape. A saved child names its variants, so whoever loads it needs the packages they come from.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.errors import ConfigError
from puzzle_ray.plugins import declared, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from puzzle_ray.calibration import Statistics
    from puzzle_ray.families.descriptor import Descriptor


ENTRY_POINTS = "puzzle_ray.variants"


class Variant(Protocol):
    """What every variant can do. `argument` is what stands behind the colon of its name (empty where there is none).

    One that is spared gathering all calibration statistics also has `needs`, a tuple of words of `Statistics`.
    """

    name: str
    kinds: tuple[SubblockKind, ...]
    trainable: bool

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        """The canonical argument for this parent; None where it would be the parent's own shape. Raises ConfigError."""

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        """Gives `layer` this variant's modules, in place; their weights are still undefined."""

    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        """Fills the weights from the parent's, without training; returns how, in a word."""


@cache
def _variants() -> dict[str, Variant]:
    found: list[Variant] = declared("puzzle_ray.variants", "VARIANT")
    return {variant.name: variant for variant in found}


@cache
def _plugins() -> dict[str, EntryPoint]:
    """What installed packages offer, by name; nothing is imported yet. Raises ConfigError where a name is taken."""
    plugins: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in _variants() or point.name in plugins:
            raise ConfigError("space", f"two variants are named {point.name!r} (one by {point.value})", "uninstall or rename one")
        plugins[point.name] = point
    return plugins


def split_name(name: str) -> tuple[str, str]:
    """`gqa:4` -> (`gqa`, `4`); `my.package:MINE:3` -> (`my.package:MINE`, `3`)."""
    parts = name.split(":")
    head = 2 if "." in parts[0] else 1
    return ":".join(parts[:head]), ":".join(parts[head:])


def find_variant(name: str, kind: SubblockKind) -> tuple[Variant, str]:
    """The variant behind a name, and its argument. Raises ConfigError for one nobody knows or that does not fit the subblock."""
    head, argument = split_name(name)
    where = f"space.{kind}"
    own = _variants().get(head)
    variant = _foreign(head, where, kind) if own is None else own
    if kind not in variant.kinds:
        raise ConfigError(where, f"variant {name!r} is not for the {kind} subblock", f"it is for: {', '.join(variant.kinds)}")
    return variant, argument


def _foreign(head: str, where: str, kind: SubblockKind) -> Variant:
    """A variant of someone else's package."""
    try:
        if "." in head:
            module_name, _, attribute = head.partition(":")
            variant: Variant = getattr(importlib.import_module(module_name), attribute)
        elif head in _plugins():
            variant = _plugins()[head].load()
        else:
            known = [v.name for v in _variants().values() if kind in v.kinds]
            raise ConfigError(where, f"unknown variant {head!r}", did_you_mean(head, [*known, *_plugins()]))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(where, f"variant {head!r} cannot be imported ({error})", "write package.module:ATTRIBUTE") from None
    wanted = ("name", "kinds", "trainable", "resolve", "reshape", "initialise")
    missing = [name for name in wanted if not hasattr(variant, name)]
    if missing:
        raise ConfigError(where, f"{head!r} is no variant: it lacks {', '.join(missing)}", "see puzzle_ray.variants.base.Variant")
    return variant


def needs(names: Iterable[str], kind: SubblockKind) -> frozenset[str]:
    """Which calibration statistics these variants start from; all of them for a variant that does not say."""
    from puzzle_ray.calibration import EVERYTHING

    return frozenset(word for name in names for word in getattr(find_variant(name, kind)[0], "needs", EVERYTHING))


def resolve(name: str, kind: SubblockKind, config: Any, multiple_of: int) -> str:
    """The canonical name of a variant for one parent: `ffn:50%` -> `ffn:256`, or `parent` where nothing would change."""
    variant, argument = find_variant(name, kind)
    resolved = variant.resolve(argument, kind, config, multiple_of)
    if resolved is None:
        return "parent"
    head, _ = split_name(name)
    return f"{head}:{resolved}" if resolved else head


def fraction_or_count(argument: str, whole: int, where: str) -> float:
    """`50%` of `whole`, or a plain number."""
    try:
        value = whole * float(argument[:-1]) / 100 if argument.endswith("%") else float(int(argument))
    except ValueError:
        raise ConfigError(where, f"{argument!r} is neither a number nor a percentage", "write 4 or 50%") from None
    if not 0 < value <= whole:
        raise ConfigError(where, f"{argument!r} is outside 1 ... {whole} (the parent's)", "write 4 or 50%")
    return value

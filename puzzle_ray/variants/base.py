"""Subblock variants: what can replace an attention or an FFN.

A variant is one file here that defines `VARIANT`, an object with the methods of `Variant`. It may also be such an object in another
package. Then its name is the dotted path `package.module:ATTRIBUTE`, or the name of an entry point of the group `puzzle_ray.variants`.

The name of a variant in a search space is `<name>` or `<name>:<argument>`. Resolved against a parent (`gqa:50%` -> `gqa:4`), the name
is canonical: it always means the same shape. A saved child has the names of its variants, so loading it needs their packages.

A whole one, in a package of yours, `our_variants/low_rank.py`: `low_rank:R` makes the FFN's down projection a product of two thin matrices,
from its singular values.

    import torch
    from torch import nn


    class LowRank:
        name, kinds, trainable, needs = "low_rank", ("ffn",), True, ()

        def resolve(self, argument, kind, config, multiple_of):
            # The canonical argument for this parent; None where it would be the parent's own shape.
            rank = int(argument)
            return None if rank >= config.hidden_size else str(rank)

        def reshape(self, layer, argument, kind, descriptor, config):
            # Shapes only: this runs again, without the parent, whenever a child is loaded.
            ffn, rank = descriptor.core(layer, "ffn"), int(argument)
            down = getattr(ffn, descriptor.ffn_down)
            like = {"bias": False, "dtype": down.weight.dtype, "device": down.weight.device}
            thin = nn.Sequential(nn.Linear(down.in_features, rank, **like), nn.Linear(rank, down.out_features, **like))
            setattr(ffn, descriptor.ffn_down, thin)

        @torch.no_grad()
        def initialise(self, layer, parent, argument, kind, descriptor, statistics):
            # The weights to start from; what it returns stands in the library's table.
            rank = int(argument)
            new, old = descriptor.core(layer, "ffn"), descriptor.core(parent, "ffn")
            for name in (descriptor.ffn_gate, descriptor.ffn_up):
                getattr(new, name).load_state_dict(getattr(old, name).state_dict())
            u, s, v = torch.linalg.svd(getattr(old, descriptor.ffn_down).weight.float(), full_matrices=False)
            first, second = getattr(new, descriptor.ffn_down)
            first.weight.copy_(v[:rank])
            second.weight.copy_(u[:, :rank] * s[:rank])
            return "singular values"


    VARIANT = LowRank()

Search spaces name it by its dotted path, `ffn: [parent, "our_variants.low_rank:VARIANT:16", noop]`, or shortly (`low_rank:16`) where the
package has an entry point:

    [project.entry-points."puzzle_ray.variants"]
    low_rank = "our_variants.low_rank:VARIANT"

The package must be installed wherever library, profile and scores are computed, and wherever a child that uses it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

from puzzle_ray.artifacts import KINDS, LayerChoice, SubblockKind
from puzzle_ray.errors import ConfigError
from puzzle_ray.plugins import declared, did_you_mean, load_plugin, plugin_source

if TYPE_CHECKING:
    from torch import nn

    from puzzle_ray.calibration import Statistics
    from puzzle_ray.families.descriptor import Descriptor


ENTRY_POINTS = "puzzle_ray.variants"


class Variant(Protocol):
    """The interface of a variant. `argument` is the part of its name behind the colon, or the empty string.

    `kinds` are the subblocks that it can replace. `trainable` says whether local distillation trains its weights.

    A variant may have an attribute `needs`: the names of the statistics it is initialised from, as `Statistics` lists them. Without it
    all statistics are gathered.

    It may also have a method `words(argument, kind, descriptor)`: its shape in the words of `puzzle_ray.surgery.shapes`, as a dict. A
    child whose variants all have words loads without this package, by the code in its folder. Without words it needs the packages of
    its variants.
    """

    name: str
    kinds: tuple[SubblockKind, ...]
    trainable: bool

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        """The canonical argument for a parent, or None where the variant would have the parent's own shape.

        `config` is the parent's transformers config. `multiple_of` is what a width of an FFN must be a multiple of. Raises ConfigError
        where the argument does not suit the parent.
        """

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        """Replaces modules of `layer` by those of this variant, in place. Their weights are still undefined.

        `layer` is a decoder layer in its parent's shape. `descriptor` has the names of its modules.
        """

    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        """Fills the weights of the variant in `layer`, in place and without training. Returns the method in a few words.

        `layer` is a decoder layer that `reshape` has given this variant. `parent` is the parent's decoder layer of the same index, with
        its weights. Read and write their projections by `puzzle_ray.surgery.projections`, as weights `[out, in]` for every family.
        `statistics` are the parent layer's on calibration tokens. Its tensors are in float64, such as
        `statistics.channel_mean_F`, `[intermediate_size]`, and `statistics.moments[kind].xx`,
        `[hidden_size + 1, hidden_size + 1]`; see `puzzle_ray.calibration` for all of them. What `needs` does not name is None.
        """


@cache
def _variants() -> dict[str, Variant]:
    variants: list[Variant] = declared("puzzle_ray.variants", "VARIANT")
    return {variant.name: variant for variant in variants}


@cache
def _plugins() -> dict[str, EntryPoint]:
    """The variants of installed packages, by name, not imported yet. Raises ConfigError where two variants have one name."""
    plugins: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in _variants() or point.name in plugins:
            raise ConfigError("space", f"two variants are named {point.name!r} (one by {point.value})", "uninstall or rename one")
        plugins[point.name] = point
    return plugins


def split_variant_name(name: str) -> tuple[str, str]:
    """`gqa:4` -> (`gqa`, `4`); `my.package:MINE:3` -> (`my.package:MINE`, `3`)."""
    parts = name.split(":")
    head = 2 if "." in parts[0] else 1
    return ":".join(parts[:head]), ":".join(parts[head:])


def find_variant(name: str, kind: SubblockKind) -> tuple[Variant, str]:
    """The variant of a name, and its argument. Raises ConfigError where no variant has the name or it is not for the subblock."""
    head, argument = split_variant_name(name)
    where = f"space.{kind}"
    own = _variants().get(head)
    variant = _plugin_variant(head, where, kind) if own is None else own
    if kind not in variant.kinds:
        raise ConfigError(where, f"variant {name!r} is not for the {kind} subblock", f"it is for: {', '.join(variant.kinds)}")
    return variant, argument


def _plugin_variant(head: str, where: str, kind: SubblockKind) -> Variant:
    """A variant of another package."""
    if "." in head:
        variant: Variant = load_plugin(head, where, "variant")
    elif head in _plugins():
        variant = load_plugin(_plugins()[head].value, where, "variant")
    else:
        known = [v.name for v in _variants().values() if kind in v.kinds]
        raise ConfigError(where, f"unknown variant {head!r}", did_you_mean(head, [*known, *_plugins()]))
    wanted = ("name", "kinds", "trainable", "resolve", "reshape", "initialise")
    missing = [name for name in wanted if not hasattr(variant, name)]
    if missing:
        raise ConfigError(where, f"{head!r} is no variant: it lacks {', '.join(missing)}", "see puzzle_ray.variants.base.Variant")
    return variant


def variant_source(name: str, kind: SubblockKind) -> dict[str, str]:
    """What identifies a variant that is not of this package, by its source; nothing for one of ours."""
    variant, _ = find_variant(name, kind)
    head, _ = split_variant_name(name)
    point = None if "." in head or head in _variants() else _plugins().get(head)
    return plugin_source(head, variant, where=f"space.{kind}", module_name=point.module if point else "")


def layer_words(choice: LayerChoice, descriptor: Descriptor) -> dict[str, Any] | None:
    """The shape of a layer in the words of `puzzle_ray.surgery.shapes`; None where a variant has no words for it."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        variant, argument = find_variant(choice.variant(kind), kind)
        if not hasattr(variant, "words"):
            return None
        for word, value in variant.words(argument, kind, descriptor).items():
            found[word] = [*found.get(word, ()), *value] if isinstance(value, list) else value
    return found


def reshape_layer(layer: nn.Module, choice: LayerChoice, descriptor: Descriptor, config: Any) -> None:
    """Gives one layer the modules of a choice, in place. The weights of replaced subblocks are undefined afterwards."""
    for kind in KINDS:
        variant, argument = find_variant(choice.variant(kind), kind)
        variant.reshape(layer, argument, kind, descriptor, config)


def needed_statistics(names: Iterable[str], kind: SubblockKind) -> frozenset[str]:
    """The names of the statistics that these variants need; all statistics where a variant does not name them."""
    from puzzle_ray.calibration import ALL_STATISTICS

    return frozenset(word for name in names for word in getattr(find_variant(name, kind)[0], "needs", ALL_STATISTICS))


def resolve_variant(name: str, kind: SubblockKind, config: Any, multiple_of: int) -> str:
    """The canonical name of a variant for one parent: `ffn:50%` -> `ffn:256`. It is `parent` where the shape would not change."""
    variant, argument = find_variant(name, kind)
    resolved = variant.resolve(argument, kind, config, multiple_of)
    if resolved is None:
        return "parent"
    head, _ = split_variant_name(name)
    return f"{head}:{resolved}" if resolved else head


def refuse_argument(name: str, argument: str, kind: SubblockKind) -> None:
    """Raises ConfigError for an argument of a variant that comes in one size: it would be dropped without a word."""
    if argument:
        raise ConfigError(f"space.{kind}", f"{name} has no sizes, and {name}:{argument} asks for one", f"write {name}")


def fraction_or_count(argument: str, whole: int, where: str) -> float:
    """The value of `50%` (of `whole`) or of a plain number. Raises ConfigError where it is neither, or above `whole`."""
    try:
        value = whole * float(argument[:-1]) / 100 if argument.endswith("%") else float(int(argument))
    except ValueError:
        raise ConfigError(where, f"{argument!r} is neither a number nor a percentage", "write 4 or 50%") from None
    if not 0 < value <= whole:
        raise ConfigError(where, f"{argument!r} is outside 1 ... {whole} (the parent's)", "write 4 or 50%")
    return value

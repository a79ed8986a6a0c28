"""Names of actors, as Ray's dashboard and `puzzle-ray watch` show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count

_numbers = count(1)
SEPARATOR = " #"


def actor_name(words: str) -> dict[str, str]:
    """The option that names an actor: `block trainer, layers 0-3 #7`. The number tells actors of one driver apart.

    An actor of the same words that is being killed may hold its name for a moment longer, so no name comes twice.
    """
    return {"name": f"{words}{SEPARATOR}{next(_numbers)}"}


def layers_in_words(layers: Sequence[int]) -> str:
    """`layers 0-3`, `layer 5`, `layers 1, 4-6`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"layer{'s' if len(layers) != 1 else ''} {', '.join(parts)}"


def part_in_words(layers: Sequence[int], part: tuple[int, int]) -> str:
    """`layers 0-3`, or `layer 5 part 1 of 2` where the layer's variants are split (parts count from 0, words from 1)."""
    number, count_ = part
    return layers_in_words(layers) + (f" part {number + 1} of {count_}" if count_ > 1 else "")


def count_by_kind(names: Sequence[str]) -> dict[str, int]:
    """How many actors there are of each kind: what stands before the comma or the number of their names."""
    kinds = (name.partition(SEPARATOR)[0].partition(",")[0] for name in names)
    return dict(Counter(kinds))

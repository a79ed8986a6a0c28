"""How damages of two blocks add up: a picture for the report, measured on children made for it alone. No pick depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from puzzle_ray.artifacts import Choices, LayerChoice, Measure

NOT_MEASURED = (
    "How damages of two blocks add up was not measured: search.interaction_blocks=4 does it, by up to 10 children more."
)


def measure_interactions(candidates: Sequence[Choices], picked: Choices, count: int, measure: Measure) -> list[dict[str, Any]]:
    """Measures how damages of two layers add up, for all pairs of the `count` blocks that candidates use most.

    For every pair: the KL with both blocks replaced, and with each alone. `interaction` is the pair's KL less the sum of the two
    single KLs. A sum of replace-one scores assumes that it is 0.
    """
    used = Counter(block for choices in (picked, *candidates) for block in enumerate(choices) if block[1] != LayerChoice())
    blocks = sorted((block for block, _ in used.most_common(count)), key=lambda block: (block[0], block[1].label))
    pairs = [(a, b) for a, b in combinations(blocks, 2) if a[0] != b[0]]  # a layer holds only one block
    if not pairs:
        return []
    whole: list[Mapping[int, LayerChoice]] = [*(dict([block]) for block in blocks), *(dict(pair) for pair in pairs)]
    measured = measure([tuple(x.get(layer, LayerChoice()) for layer in range(len(picked))) for x in whole])
    alone = {block: m.kl for block, m in zip(blocks, measured, strict=False)}
    return [
        {
            "a": f"layer {a[0]}: {a[1].label}",
            "b": f"layer {b[0]}: {b[1].label}",
            "kl_a": alone[a],
            "kl_b": alone[b],
            "kl_both": both.kl,
            "interaction": both.kl - alone[a] - alone[b],
        }
        for (a, b), both in zip(pairs, measured[len(blocks) :], strict=True)
    ]

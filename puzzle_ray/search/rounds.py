"""A budget that is reached in rounds: every round takes an equal share of the way, and its child is the next round's parent.

(Iterative Puzzle, arXiv 2607.04371.) Costs are counted from the original model, on its own profile, in every round. With limit L and the
original's cost C, round i of k has the limit C (L / C)^(i / k). So the last round has the user's limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from puzzle_ray.artifacts import KINDS, PARENT, Architecture, LayerChoice, Profile, Scenario, Scores, SearchSpace
from puzzle_ray.search.kv_heads import KV_HEADS
from puzzle_ray.search.limits import SPEEDS, FixedChoice, Limits
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.tables import COST_INDEX, predicted_costs, table_at_batch_size

_COUNTS = ("params", KV_HEADS)  # limits that are whole numbers
_OF_FRACTION = {"latency_fraction": "latency_ms", "memory_fraction": "memory_mib", "params_fraction": "params"}
THROUGHPUT = "throughput_tokens_per_s"
_ANY = Limits(params=1)  # of which only `fixed` and `agree` are read: none


def _in_numbers(limits: Limits, own: Mapping[str, float]) -> dict[str, float]:
    """The limits without those relative to the original, whose costs are `own`."""
    found: dict[str, float] = {}
    for name, value in limits.asked.items():
        if name == "speedup":
            found[THROUGHPUT] = max(found.get(THROUGHPUT, 0.0), value * own[THROUGHPUT])
        elif name == THROUGHPUT:
            found[THROUGHPUT] = max(found.get(THROUGHPUT, 0.0), value)
        else:
            at_most = value * own[_OF_FRACTION[name]] if name in _OF_FRACTION else value
            name = _OF_FRACTION.get(name, name)
            found[name] = min(found.get(name, math.inf), at_most)
    return found


def _on_the_way(name: str, last: float, own: float, share: float) -> float:
    """The limit after a share of the way. A limit that the original meets already stays as it is."""
    if own <= 0 or share == 1.0 or (last <= own if name in SPEEDS else last >= own):
        return last
    return float(own * (last / own) ** share)


def _still_to_fix(limits: Limits, space: SearchSpace) -> dict[int, FixedChoice]:
    """`limits.fixed` in the words of this round: what a layer is already is its parent's own."""
    found = {}
    for layer, fixed in limits.fixed.items():
        now = space.layers[layer].now if layer < len(space.layers) else LayerChoice()
        words = {"attention": fixed.attention, "ffn": fixed.ffn}
        found[layer] = FixedChoice(**{k: PARENT if words[k] == now.variant(k) else words[k] for k in KINDS})
    return found


def _original(space: SearchSpace) -> SearchSpace:
    """The space as one of the original alone."""
    return SearchSpace(tuple(replace(layer, attention=(PARENT,), ffn=(PARENT,), now=LayerChoice()) for layer in space.layers))


def original_costs(space: SearchSpace, profile: Profile, scenario: Scenario) -> dict[str, float]:
    """What the original costs, by the names of limits."""
    whole = _original(space)
    problem = table_at_batch_size(whole, Scores((), "block"), "", profile, scenario, _ANY).problem
    costs = problem.constants + problem.costs.sum(axis=(1, 2))
    units = {"latency": "_ms", "prefill": "_ms", "decode": "_ms", "memory": "_mib", "kv_cache": "_mib"}
    found = {name + units.get(name, ""): float(costs[i]) for name, i in COST_INDEX.items() if i < len(costs)}
    parent = predicted_costs(whole, profile, scenario, [LayerChoice()] * len(whole.layers))
    return found | {THROUGHPUT: parent.throughput_tokens_per_s}


def limits_of_round(limits: Limits, number: int, rounds: int, space: SearchSpace, profile: Profile, scenario: Scenario) -> Limits:
    """The limits of round `number`, counted from 1, of `rounds`: as they are where there is only one, in numbers else."""
    if rounds == 1:
        return limits
    own = original_costs(space, profile, scenario)
    values = {n: _on_the_way(n, last, own.get(n, last), number / rounds) for n, last in _in_numbers(limits, own).items()}
    whole = {name: max(1, int(value)) if name in _COUNTS else value for name, value in values.items()}
    return Limits.model_validate(
        {**whole, "at_least": _at_least(limits, own, whole), "fixed": _still_to_fix(limits, space), "agree": limits.agree}
    )


def _at_least(limits: Limits, own: Mapping[str, float], values: Mapping[str, float]) -> dict[str, float]:
    """The minimums, those relative to the original in numbers as well: a later round's parent is a child."""
    found: dict[str, float] = {}
    for name, value in limits.at_least.items():
        least = value * own[_OF_FRACTION[name]] if name in _OF_FRACTION else value
        name = _OF_FRACTION.get(name, name)
        found[name] = max(found.get(name, 0.0), least)
    return {name: least for name, least in found.items() if least <= values.get(name, least)}


def counted_from_original(architecture: Architecture, setup: SearchSetup) -> Architecture:
    """The same with the original's costs as the parent's, so that its speed-up is over the original."""
    whole = _original(setup.space)
    parent = predicted_costs(whole, setup.profile, setup.scenario, [LayerChoice()] * len(whole.layers))
    return replace(architecture, parent_predicted=parent)


def unchanged_layers(choices: tuple[LayerChoice, ...]) -> tuple[int, ...]:
    """The layers that a round left as they were. Their variants are the next round's, too, and are not trained again."""
    return tuple(index for index, choice in enumerate(choices) if choice == LayerChoice())

"""From a search space, scores and a profile to a `Problem`, and from its answer back to an `Architecture`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from puzzle_ray.artifacts import (
    KINDS,
    MIB,
    Architecture,
    Costs,
    LayerChoice,
    Profile,
    ProfileRow,
    Scenario,
    Scores,
    SearchSpace,
)
from puzzle_ray.errors import ConfigError, Infeasible, ProfileError
from puzzle_ray.plugins import did_you_mean
from puzzle_ray.search import Options, find
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.problem import Choice, Limit, Problem, Solution

COST_NAMES = ("runtime_ms", "prefill_ms", "decode_ms", "memory_mib", "num_params")


def costs_of(rows: Iterable[ProfileRow], scenario: Scenario) -> tuple[float, ...]:
    """What some subblocks cost together, in the order of COST_NAMES.

    The first token comes at the end of the prefill, so `output_tokens` tokens take `output_tokens - 1` decode steps.
    """
    rows = list(rows)
    prefill_ms, decode_ms = math.fsum(r.prefill_ms for r in rows), math.fsum(r.decode_ms for r in rows)
    kv_bytes = scenario.batch_size * scenario.tokens_per_sequence * sum(r.kv_bytes_per_token for r in rows)
    return (
        prefill_ms + (scenario.output_tokens - 1) * decode_ms,
        prefill_ms,
        decode_ms,
        (sum(r.weight_bytes for r in rows) + kv_bytes) / MIB,
        float(sum(r.num_params for r in rows)),
    )


def _row(profile: Profile, layer_type: str, choice: LayerChoice, batch_size: int) -> list[ProfileRow]:
    try:
        return [profile.row(layer_type, kind, choice.variant(kind), batch_size) for kind in KINDS]
    except KeyError as error:
        raise ProfileError(
            "profile",
            f"no cost of {error.args[0]} (layer type, subblock, variant, batch size)",
            "profile this space again",
        ) from None


def _fixed(profile: Profile, scenario: Scenario) -> ProfileRow:
    try:
        row = profile.fixed(scenario.batch_size)
    except KeyError:
        sizes = ", ".join(map(str, profile.batch_sizes))
        raise ProfileError(
            "profile.scenario.batch_size", f"{scenario.batch_size} was not profiled", f"profiled: {sizes}"
        ) from None
    if (row.input_tokens, row.output_tokens) != (scenario.input_tokens, scenario.output_tokens):
        raise ProfileError(
            "profile.scenario",
            f"asks for {scenario.input_tokens} tokens in and {scenario.output_tokens} out, but the profile has "
            f"{row.input_tokens} and {row.output_tokens}",
            "profile again",
        )
    return row


def predicted_costs(space: SearchSpace, profile: Profile, scenario: Scenario, choices: Sequence[LayerChoice]) -> Costs:
    """What a whole model costs at the scenario's batch size. Raises ProfileError where a part was not profiled."""
    rows = [_fixed(profile, scenario)]
    for layer, choice in zip(space.layers, choices, strict=True):
        rows.extend(_row(profile, layer.layer_type, choice, scenario.batch_size))
    runtime_ms, prefill_ms, decode_ms, memory_mib, num_params = costs_of(rows, scenario)
    tokens = scenario.batch_size * scenario.tokens_per_sequence
    throughput = 1000.0 * tokens / runtime_ms if runtime_ms > 0 else math.inf
    return Costs(scenario.batch_size, prefill_ms, decode_ms, runtime_ms, throughput, memory_mib, int(num_params))


def limits_of(limits: Limits, parent: Costs, scenario: Scenario) -> tuple[Limit, ...]:
    """The user's limits as bounds on costs at the scenario's batch size; `parent` may have been taken at another."""
    tokens = 1000.0 * scenario.batch_size * scenario.tokens_per_sequence
    parents = {"latency": parent.runtime_ms, "memory": parent.memory_mib, "params": float(parent.num_params)}
    row = {"latency": 0, "prefill": 1, "decode": 2, "memory": 3, "params": 4}
    found = []
    for name, asked in limits.asked.items():
        what, _, unit = name.partition("_")
        if name == "speedup":
            over = tokens / parent.throughput_tokens_per_s
            found.append(Limit(name, 0, over / asked, asked, "x", over=over))
        elif name == "throughput_tokens_per_s":
            found.append(Limit(name, 0, tokens / asked, asked, "tokens/s", over=tokens))
        elif unit == "fraction":
            found.append(Limit(name, row[what], asked * parents[what], asked, "of the parent", of=parents[what]))
        else:
            found.append(Limit(name, row[what], asked, asked, {"ms": "ms", "mib": "MiB"}.get(unit, "")))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Table:
    """A problem at one batch size, and what its rows and choices stand for: `layers` and `choices` of every row."""

    problem: Problem
    layers: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[LayerChoice, ...], ...]
    scenario: Scenario

    def named(self, choice: Choice) -> tuple[LayerChoice, ...]:
        """The choice of every layer of the model."""
        by_layer = {x: self.choices[row][v] for row, v in enumerate(choice) for x in self.layers[row]}
        return tuple(by_layer[x] for x in range(len(by_layer)))


def _allowed(space: SearchSpace, limits: Limits, layer: int) -> list[LayerChoice]:
    """What one layer may become, given what the user fixed. Raises ConfigError for a variant that it does not have."""
    choices = list(space.layers[layer].choices)
    for kind in KINDS if layer in limits.fixed else ():
        wanted = limits.fixed[layer].attention if kind == "attention" else limits.fixed[layer].ffn
        known = space.layers[layer].variants(kind)
        if wanted is not None and wanted not in known:
            raise ConfigError(
                f"search.limits.fixed.{layer}.{kind}",
                f"layer {layer} has no variant {wanted!r}",
                did_you_mean(wanted, known),
            )
        choices = [c for c in choices if wanted is None or c.variant(kind) == wanted]
    return choices


def _groups(space: SearchSpace, limits: Limits) -> list[tuple[tuple[int, ...], tuple[LayerChoice, ...]]]:
    """The problem's rows: layers that must agree, and the choices that all of them have."""
    named = {layer for group in limits.agree for layer in group} | set(limits.fixed)
    if named and max(named) >= len(space.layers):
        raise ConfigError("search.limits", f"layer {max(named)} is named", f"layers go from 0 to {len(space.layers) - 1}")
    together = {layer for group in limits.agree for layer in group}
    groups = [*limits.agree, *((layer,) for layer in range(len(space.layers)) if layer not in together)]
    found = []
    for group in sorted(groups, key=min):
        shared = set.intersection(*(set(_allowed(space, limits, layer)) for layer in group))
        if not shared:
            raise ConfigError("search.limits.agree", f"layers {list(group)} have no choice in common", "let fewer layers agree")
        found.append((tuple(sorted(group)), tuple(c for c in _allowed(space, limits, group[0]) if c in shared)))
    return found


def _score(scores: Scores, layer: int, choice: LayerChoice, metric: str) -> float:
    try:
        value = scores.value(layer, choice, metric)
    except KeyError:
        raise ConfigError(
            "scores", f"layer {layer} has no {metric} score of {choice.label}", "score this search space again"
        ) from None
    if not math.isfinite(value):
        raise ConfigError("scores", f"the {metric} score of {choice.label} at layer {layer} is {value}", "drop this variant")
    return value


def table(
    space: SearchSpace, scores: Scores, metric: str, profile: Profile, scenario: Scenario, limits: Limits, parent: Costs
) -> Table:
    """The numbers at the scenario's batch size. Raises ConfigError or ProfileError where one is missing."""
    groups = _groups(space, limits)
    width = max(len(choices) for _, choices in groups)
    score = np.full((len(groups), width), np.inf)
    costs = np.zeros((len(COST_NAMES), len(groups), width))
    for row, (layers, choices) in enumerate(groups):
        for v, choice in enumerate(choices):
            score[row, v] = math.fsum(_score(scores, layer, choice, metric) for layer in layers)
            parts = [r for x in layers for r in _row(profile, space.layers[x].layer_type, choice, scenario.batch_size)]
            costs[:, row, v] = costs_of(parts, scenario)
    problem = Problem(
        score,
        costs,
        COST_NAMES,
        np.array(costs_of([_fixed(profile, scenario)], scenario)),
        np.array([len(layers) for layers, _ in groups], dtype=np.intp),
        tuple(tuple(choice.label for choice in choices) for _, choices in groups),
        limits_of(limits, parent, scenario),
    )
    return Table(problem, tuple(g[0] for g in groups), tuple(g[1] for g in groups), scenario)


def search(
    space: SearchSpace,
    scores: Scores,
    profile: Profile,
    scenario: Scenario,
    limits: Limits,
    *,
    metric: str = "kl",
    searcher: str = "mip",
    count: int = 1,
    min_different_layers: int = 1,
    time_limit_s: float | None = 60.0,
    seed: int = 0,
) -> list[Architecture]:
    """Up to `count` architectures within the limits, best first, over all batch sizes of the profile.

    Of equally good ones the one of higher throughput. Each differs from all before it in at least
    `min_different_layers` layers; fewer come back where there are no more. Raises Infeasible where there is none at
    all, ConfigError for settings that do not fit the space.
    """
    method, options = find(searcher), Options(time_limit_s=time_limit_s, seed=seed)
    parent = predicted_costs(space, profile, scenario, [LayerChoice()] * len(space.layers))
    scenarios = [replace(scenario, batch_size=size) for size in profile.batch_sizes]
    tables = [table(space, scores, metric, profile, s, limits, parent) for s in scenarios]
    found: list[Architecture] = []
    while len(found) < count:
        solved: list[tuple[Table, Solution]] = []
        errors: list[Infeasible] = []
        for candidate in tables:
            try:
                solved.append((candidate, method.solve(candidate.problem, options)))
            except Infeasible as error:
                errors.append(error)
        if not solved:
            if found:
                break
            raise min(errors, key=_shortfall)
        costs = [predicted_costs(space, profile, t.scenario, t.named(s.choice)) for t, s in solved]
        best = min(range(len(solved)), key=lambda i: (solved[i][1].objective, -costs[i].throughput_tokens_per_s))
        chosen, solution = solved[best]
        bound = min(s.bound for _, s in solved)
        found.append(
            Architecture(
                choices=chosen.named(solution.choice),
                searcher=searcher,
                objective=solution.objective,
                bound=bound,
                status="feasible" if solution.status == "optimal" and bound < solution.objective else solution.status,
                solve_s=sum(s.solve_s for _, s in solved),
                predicted=costs[best],
                parent_predicted=parent,
                limits=limits.asked,
                metric=metric,
                estimated=profile.estimated,
            )
        )
        tables = [replace(t, problem=t.problem.apart_from(solution.choice, min_different_layers)) for t in tables]
    return found


def _shortfall(error: Infeasible) -> float:
    _, _, asked, best, *_ = error.args
    return abs(float(best) - float(asked)) / max(abs(float(asked)), 1e-12)

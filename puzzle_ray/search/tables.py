"""From a search space, scores and a profile to a `Problem`, and from a solution back to an `Architecture`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from puzzle_ray.artifacts import (
    KINDS,
    MIB,
    Architecture,
    Costs,
    LayerChoice,
    LayerSpace,
    Profile,
    ProfileRow,
    Scenario,
    Scores,
    SearchSpace,
)
from puzzle_ray.errors import ConfigError, Infeasible, OutOfTime, ProfileError
from puzzle_ray.plugins import did_you_mean
from puzzle_ray.search.kv_heads import KV_HEADS, kv_head_bytes, kv_heads_of
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.problem import Choice, Limit, Problem, Solution
from puzzle_ray.search.relaxation import lower_bound
from puzzle_ray.search.searcher import Options, find_searcher

COST_NAMES = ("runtime_ms", "prefill_ms", "decode_ms", "memory_mib", "num_params", "kv_cache_mib")
COST_INDEX = {name: i for i, name in enumerate(("latency", "prefill", "decode", "memory", "params", "kv_cache", KV_HEADS))}


def costs_of(rows: Iterable[ProfileRow], scenario: Scenario) -> tuple[float, ...]:
    """What some subblocks cost together, in the order of COST_NAMES.

    The first token comes at the end of the prefill, so `output_tokens` tokens take `output_tokens - 1` decode steps.
    """
    rows = list(rows)
    prefill_ms, decode_ms = math.fsum(r.prefill_ms for r in rows), math.fsum(r.decode_ms for r in rows)
    kv_mib = scenario.batch_size * scenario.kv_tokens_per_sequence * sum(r.kv_bytes_per_token for r in rows) / MIB
    return (
        prefill_ms + (scenario.output_tokens - 1) * decode_ms,
        prefill_ms,
        decode_ms,
        sum(r.weight_bytes for r in rows) / MIB + kv_mib,
        float(sum(r.num_params for r in rows)),
        kv_mib,
    )


def _profile_rows(profile: Profile, layer: LayerSpace, choice: LayerChoice, batch_size: int) -> list[ProfileRow]:
    """Of attention and FFN."""
    try:
        return [profile.row(layer.layer_type, kind, choice.on(layer.now).variant(kind), batch_size) for kind in KINDS]
    except KeyError as error:
        raise ProfileError(
            "profile",
            f"no cost of {error.args[0]} (layer type, subblock, variant, batch size)",
            "profile this space again",
        ) from None


def _fixed_row(profile: Profile, scenario: Scenario) -> ProfileRow:
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
            f"asks for {scenario.input_tokens:g} tokens in and {scenario.output_tokens:g} out, but the profile has "
            f"{row.input_tokens:g} and {row.output_tokens:g}",
            "profile again",
        )
    return row


def predicted_costs(space: SearchSpace, profile: Profile, scenario: Scenario, choices: Sequence[LayerChoice]) -> Costs:
    """What a whole model costs at the scenario's batch size. Raises ProfileError where a part was not profiled."""
    rows = [_fixed_row(profile, scenario)]
    for layer, choice in zip(space.layers, choices, strict=True):
        rows.extend(_profile_rows(profile, layer, choice, scenario.batch_size))
    runtime_ms, prefill_ms, decode_ms, memory_mib, num_params, _ = costs_of(rows, scenario)
    tokens = scenario.batch_size * scenario.tokens_per_sequence
    throughput = 1000.0 * tokens / runtime_ms if runtime_ms > 0 else math.inf
    return Costs(scenario.batch_size, prefill_ms, decode_ms, runtime_ms, throughput, memory_mib, int(num_params))


def cost_limits(asked: Mapping[str, float], parent: Costs, scenario: Scenario) -> tuple[Limit, ...]:
    """Limits by name, as bounds on costs at the scenario's batch size. `parent` may be at another batch size."""
    tokens = 1000.0 * scenario.batch_size * scenario.tokens_per_sequence
    parents = {"latency": parent.runtime_ms, "memory": parent.memory_mib, "params": float(parent.num_params)}
    limits = []
    for name, value in asked.items():
        what, _, unit = name.rpartition("_")
        if name == "speedup":
            over = tokens / parent.throughput_tokens_per_s
            limits.append(Limit(name, 0, over / value, value, "x", over=over))
        elif name == "throughput_tokens_per_s":
            limits.append(Limit(name, 0, tokens / value, value, "tokens/s", over=tokens))
        elif unit == "fraction":
            limits.append(Limit(name, COST_INDEX[what], value * parents[what], value, "of the parent", of=parents[what]))
        else:
            index = COST_INDEX[name] if name in COST_INDEX else COST_INDEX[what]
            limits.append(Limit(name, index, value, value, {"ms": "ms", "mib": "MiB"}.get(unit, "")))
    return tuple(limits)


def problem_within(problem: Problem, limits: Limits, parent: Costs, scenario: Scenario) -> Problem:
    """The problem with all limits, the minimums of ranges included. Raises ConfigError where KV heads cannot be counted."""
    if KV_HEADS in {*limits.asked, *limits.at_least} and KV_HEADS not in problem.cost_names:
        raise ConfigError(f"search.limits.{KV_HEADS}", "no gqa variant was profiled to count heads by", "limit kv_cache_mib")
    within = problem.with_limits(cost_limits(limits.asked, parent, scenario))
    for least in cost_limits(limits.at_least, parent, scenario):
        within = within.at_least(least)
    return within


@dataclass(frozen=True, eq=False)
class Table:
    """A problem at one batch size. `layers` and `choices` say what every row and its choices stand for."""

    problem: Problem
    layers: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[LayerChoice, ...], ...]
    scenario: Scenario

    def named(self, choice: Choice) -> tuple[LayerChoice, ...]:
        """The choice of every layer of the model."""
        by_layer = {x: self.choices[row][v] for row, v in enumerate(choice) for x in self.layers[row]}
        return tuple(by_layer[x] for x in range(len(by_layer)))


def _allowed(space: SearchSpace, limits: Limits, layer: int) -> list[LayerChoice]:
    """The choices of one layer that agree with `limits.fixed`. Raises ConfigError for a variant that the layer does not have."""
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
    """The rows of the problem: the layers of each, and the choices that all of these layers have."""
    named = {layer for group in limits.agree for layer in group} | set(limits.fixed)
    if named and max(named) >= len(space.layers):
        raise ConfigError("search.limits", f"layer {max(named)} is named", f"layers go from 0 to {len(space.layers) - 1}")
    together = {layer for group in limits.agree for layer in group}
    groups = [*limits.agree, *((layer,) for layer in range(len(space.layers)) if layer not in together)]
    rows = []
    for group in sorted(groups, key=min):
        shared = set.intersection(*(set(_allowed(space, limits, layer)) for layer in group))
        if not shared:
            raise ConfigError("search.limits.agree", f"layers {list(group)} have no choice in common", "let fewer layers agree")
        rows.append((tuple(sorted(group)), tuple(c for c in _allowed(space, limits, group[0]) if c in shared)))
    return rows


def check_limits(space: SearchSpace, limits: Limits) -> None:
    """Raises ConfigError for layers or variants in `fixed` and `agree` that the space does not have."""
    _groups(space, limits)


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


def table_at_batch_size(
    space: SearchSpace, scores: Scores, metric: str, profile: Profile, scenario: Scenario, choices: Limits
) -> Table:
    """The numbers at the scenario's batch size, without limits on costs. Of `choices` only `fixed` and `agree` are read.

    Raises ConfigError or ProfileError where a number is missing.
    """
    groups = _groups(space, choices)
    width = max(len(shared) for _, shared in groups)
    size = scenario.batch_size
    head_bytes = {x.layer_type: kv_head_bytes(profile, x.layer_type, size) for x in space.layers}
    counts_kv_heads = all(head_bytes.values())
    names = (*COST_NAMES, KV_HEADS) if counts_kv_heads else COST_NAMES
    score = np.full((len(groups), width), np.inf)
    costs = np.zeros((len(names), len(groups), width))
    for row, (layers, shared) in enumerate(groups):
        for v, choice in enumerate(shared):
            score[row, v] = math.fsum(_score(scores, layer, choice, metric) for layer in layers)
            parts = [r for x in layers for r in _profile_rows(profile, space.layers[x], choice, size)]
            costs[: len(COST_NAMES), row, v] = costs_of(parts, scenario)
            if counts_kv_heads:
                attentions = parts[::2]
                costs[-1, row, v] = sum(kv_heads_of(r, profile, head_bytes[r.layer_type]) for r in attentions)
    constants = np.zeros(len(names))
    constants[: len(COST_NAMES)] = costs_of([_fixed_row(profile, scenario)], scenario)
    weights = np.array([len(layers) for layers, _ in groups], dtype=np.intp)
    labels = tuple(tuple(choice.label for choice in shared) for _, shared in groups)
    problem = Problem(score, costs, names, constants, weights, labels)
    return Table(problem, tuple(g[0] for g in groups), tuple(g[1] for g in groups), scenario)


@dataclass(frozen=True, eq=False)
class Tables:
    """All numbers of a search except its limits: one table per batch size, and the parent's costs at the scenario's batch size."""

    space: SearchSpace
    profile: Profile
    metric: str
    parent: Costs
    tables: tuple[Table, ...]

    @classmethod
    def of(cls, space: SearchSpace, scores: Scores, profile: Profile, scenario: Scenario, metric: str, choices: Limits) -> Tables:
        """Raises ConfigError or ProfileError where a number is missing, or a fixed choice does not fit the space."""
        parent = predicted_costs(space, profile, scenario, [LayerChoice()] * len(space.layers))
        sizes = [replace(scenario, batch_size=size) for size in profile.batch_sizes]
        return cls(
            space, profile, metric, parent, tuple(table_at_batch_size(space, scores, metric, profile, s, choices) for s in sizes)
        )

    def bounded(self, limits: Limits, batch_size: int) -> Limits:
        """The limits, with `memory_mib` lowered to what the device has left for weights and KV cache.

        Activations and the engine's own memory are taken off. Nothing changes where the device's memory is not known.
        """
        details = self.profile.details
        if "memory_mib" not in details:
            return limits
        unavailable_mib = details.get("reserved_mib", 0.0) + details.get("activation_mib", {}).get(str(batch_size), 0.0)
        room_mib = details["memory_mib"] - unavailable_mib
        if (limits.memory_mib or math.inf) <= room_mib:
            return limits
        return limits.model_copy(update={"memory_mib": room_mib})

    def within(self, limits: Limits) -> tuple[Table, ...]:
        """The tables with limits on them."""

        def limit(t: Table) -> Table:
            own = self.bounded(limits, t.scenario.batch_size)
            return replace(t, problem=problem_within(t.problem, own, self.parent, t.scenario))

        return tuple(map(limit, self.tables))

    def search(
        self,
        limits: Limits,
        *,
        searcher: str = "mip",
        count: int = 1,
        min_different_layers: int = 1,
        options: Options | None = None,
    ) -> list[Answer]:
        """Like `search_architectures`, with the table and the choice behind every architecture."""
        found: list[Answer] = []
        try:
            for answer in islice(self.answers(limits, searcher, min_different_layers, options or Options()), count):
                found.append(answer)
        except (Infeasible, OutOfTime):
            if not found:
                raise
        return found

    def answers(self, limits: Limits, searcher: str, min_different_layers: int, options: Options) -> Iterator[Answer]:
        """Answers, best first, each apart from all before it. Raises Infeasible where no more is left, or OutOfTime."""
        method = find_searcher(searcher)
        plain = tables = self.within(limits)
        while True:
            solved: list[tuple[Table, Solution]] = []
            unsolved: list[Table] = []
            refused: list[Table] = []
            errors: list[Infeasible] = []
            for table in tables:
                try:
                    solved.append((table, method.solve(table.problem, options)))
                except Infeasible as error:
                    errors.append(error)
                    refused.append(table)
                except OutOfTime:
                    unsolved.append(table)
            if unsolved and not solved:
                raise _out_of_time(unsolved, options)
            if not solved:
                raise min(errors, key=_shortfall)
            open_ones = refused if any(solution.status == "heuristic" for _, solution in solved) else []
            answer = self._best(solved, unsolved, open_ones, limits, searcher)
            yield replace(answer, table=next(t for t in plain if t.scenario == answer.table.scenario))
            tables = tuple(replace(t, problem=t.problem.apart_from(answer.choice, min_different_layers)) for t in tables)

    def _best(
        self,
        solved: Sequence[tuple[Table, Solution]],
        unsolved: Sequence[Table],
        refused: Sequence[Table],
        limits: Limits,
        searcher: str,
    ) -> Answer:
        """The solution of least objective over batch sizes. Of equal ones, the one of higher throughput.

        It is optimal only if no batch size can have a better one: those that are not solved count with the bound of their relaxation,
        and so do those that were `refused` by a heuristic, which finds nothing and proves nothing.
        """
        named = [(t, s, self.costs(t, s.choice)) for t, s in solved]
        chosen, solution, costs = min(named, key=lambda x: (x[1].objective, -x[2].throughput_tokens_per_s))
        bound = min([solution.objective, *(s.bound for _, s in solved), *(lower_bound(t.problem) for t in (*unsolved, *refused))])
        limits = self.bounded(limits, chosen.scenario.batch_size)
        architecture = Architecture(
            choices=chosen.named(solution.choice),
            searcher=searcher,
            objective=solution.objective,
            bound=bound,
            status="feasible" if solution.status == "optimal" and bound < solution.objective else solution.status,
            solve_s=sum(s.solve_s for _, s in solved),
            predicted=costs,
            parent_predicted=self.parent,
            limits=limits.asked | {f"{name}_min": least for name, least in limits.at_least.items()},
            metric=self.metric,
            estimated=self.profile.estimated,
            unsolved_batch_sizes=tuple(t.scenario.batch_size for t in unsolved),
            now=self.space.now,
        )
        return Answer(architecture, chosen, solution.choice)

    def costs(self, table: Table, choice: Choice) -> Costs:
        """Predicted costs of a choice at the table's batch size."""
        return predicted_costs(self.space, self.profile, table.scenario, table.named(choice))


@dataclass(frozen=True, eq=False)
class Answer:
    """An architecture, with the table and the choice behind it. The table has the user's limits."""

    architecture: Architecture
    table: Table
    choice: Choice


def search_architectures(
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

    Of equally good ones, the one of higher throughput comes first. Each differs from all before it in at least
    `min_different_layers` layers. Fewer are returned where there are no more, or where time ran out before the next one was found.
    Raises Infeasible where there is none, OutOfTime where time ran out before the first, and ConfigError for settings that do not
    fit the space.
    """
    options = Options(time_limit_s=time_limit_s, seed=seed)
    tables = Tables.of(space, scores, profile, scenario, metric, limits)
    answers = tables.search(limits, searcher=searcher, count=count, min_different_layers=min_different_layers, options=options)
    return [answer.architecture for answer in answers]


def _out_of_time(unsolved: Sequence[Table], options: Options) -> OutOfTime:
    sizes = ", ".join(str(table.scenario.batch_size) for table in unsolved)
    problem = f"no architecture was found within {options.time_limit_s:g} s at batch size {sizes}"
    return OutOfTime("search.time_limit_s", problem, "allow more time")


def _shortfall(error: Infeasible) -> float:
    _, _, asked, best, *_ = error.args
    return abs(float(best) - float(asked)) / max(abs(float(asked)), 1e-12)

"""Whether any architecture can meet a budget at all, known before anything is trained."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from puzzle_ray.artifacts import FIXED, Profile, ProfileRow, Scenario, ScoreRow, Scores, SearchSpace
from puzzle_ray.errors import OutOfTime
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.tables import Tables

# What is known from shapes alone, without a measurement.
SIZES = ("memory_mib", "memory_fraction", "params", "params_fraction", "kv_heads", "kv_cache_mib")


def check_budget(space: SearchSpace, profile: Profile, scenario: Scenario, limits: Limits) -> None:
    """Raises Infeasible where no architecture meets the limits by this profile, whatever the scores will be.

    It searches with scores of 0, so the answer is that of the search itself: each limit alone, and all of them together.
    Where that takes too long nothing is known, and nothing is raised.
    """
    with suppress(OutOfTime):
        Tables.of(space, _no_damage(space), profile, scenario, "kl", limits).search(limits)


def check_sizes(space: SearchSpace, model_config: Any, config: ProfileConfig, limits: Limits) -> None:
    """The same for the limits on parameters and memory, before anything is measured. Raises Infeasible."""
    asked = {name: getattr(limits, name) for name in SIZES if getattr(limits, name) is not None}
    if not asked:
        return
    at_least = {name: least for name, least in limits.at_least.items() if name in SIZES}
    known = Limits.model_validate({**asked, "at_least": at_least, "fixed": limits.fixed, "agree": limits.agree})
    check_budget(space, _sizes_alone(space, model_config, config), config.scenario, known)


def _no_damage(space: SearchSpace) -> Scores:
    rows = (
        ScoreRow(index, choice.attention, choice.ffn, "kl", 0.0, 0.0, 0)
        for index, layer in enumerate(space.layers)
        for choice in layer.choices
    )
    return Scores(tuple(rows), "block")


def _sizes_alone(space: SearchSpace, model_config: Any, config: ProfileConfig) -> Profile:
    """A profile in which everything takes a millisecond: its bytes and parameters are those of the real shapes."""
    from puzzle_ray.profiling.measure import profile_tasks, subblock_sizes

    scenario, rows = config.scenario, {}
    for task in profile_tasks(space, config):
        for size in subblock_sizes(task, model_config, config):
            layer_type = "" if size.subblock == FIXED else task.layer_type
            of = (layer_type, size.subblock, size.variant, task.batch_size)
            lengths = (scenario.input_tokens, scenario.output_tokens)
            sizes = (size.weight_bytes, size.kv_bytes_per_token, size.num_params)
            rows[of] = ProfileRow(*of, *lengths, 1.0, 1.0, 0.0, 0.0, *sizes, True)
    return Profile(tuple(rows.values()), "sizes", "", "any", config.dtype, True)

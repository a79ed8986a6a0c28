"""Settings of the search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from puzzle_ray.plugins import did_you_mean
from puzzle_ray.search.limits import BUDGETS, SCENARIO_AXES, Limits
from puzzle_ray.settings import Count, NonNegative, Positive, Section


class SearchConfig(Section):
    """The budget, how it is searched, and whether whole children are measured before one is picked.

    Children are measured, on `measure_tokens` held-out tokens, where `candidates` > 1, `local_search_steps` > 0 or `race_rungs` > 0:
    the `candidates` best answers, which differ from each other in at least `min_different_layers` layers. After the first two, one is
    left out whose KL is predicted, by the children measured so far, above `predicted_within` times the least KL (null: none is).
    Then up to `corrections` answers to scores that are corrected by what was measured, one after another: where one is predicted below
    the least KL, or where that is above `rivals_from` times its sum of scores (such sums say little, as where whole layers go) and the
    one before it was the best. In that second case one answer of each searcher in `rivals` is measured too, unless `predicted_within`
    leaves it out. Then a local search exchanges blocks as long as the measured KL falls.
    `interaction_blocks: 4` also measures each of the 4 most used blocks alone and every pair of them, up to 10 children more: the report
    then shows how damages of pairs add up. No pick depends on that.
    `without: [linear]` also measures the best answer that has no variant of this family. With `distil_tokens` all candidates and what
    the local search found are distilled by so many tokens, and the one is picked that is best then: how far a child is from the parent
    before distillation says little of what distillation makes of it. A least squares fit has little to learn, a narrow FFN much. So
    none is left out there, and no scores are corrected.
    With `race_rungs` children race instead: each begins the distillation that the child of this run is to have, all of `gkd.tokens` in one
    schedule, and pauses at so many rungs, each with three times the tokens of the one below. The last rung is the end. The best third by
    held-out KL goes on from each, and from the last but one only the best. It is the pick, and stage `gkd` goes on from where it is: only
    what the others read is read besides (and, with `gkd.learning_rate: auto`, what their range tests do). There race the `race_own` of
    least KL of the searcher's answers, those to corrected scores and what the local search found, and the answers of `without` and of
    `rivals`, of which none is left out then; but none whose KL before distillation is above `race_within` times the least. One that is left
    alone begins no race.
    With `target_format: nemotron_nas` the search space has only what vLLM runs in that format: no linear, no windows, no no-op
    attention in the first layer, and FFN widths that are multiples of 256.
    `sweep` maps an axis to a list of values. An axis is a limit's name, `batch_size`, `input_tokens` or `output_tokens`. All
    combinations are searched. `sweep_measure` measures the architectures on the frontier. `sweep_gkd` also distils and measures them:
    one after the other, or, with more than one of `sweep_rungs`, side by side as trials of Ray Tune, each in one process. Each rung has
    three times the tokens of the one below, and the last one all of `gkd.tokens`. For each budget `candidates` children begin, and the
    one that comes furthest is taken; a child ends at a rung where another one within the same or a stricter budget has a lower held-out
    KL, unless it is among the best third there.
    """

    limits: Limits = Limits(speedup=1.5)
    searcher: str = "mip"
    target_format: Literal["native", "nemotron_nas"] = "native"
    time_limit_s: Positive = 60.0
    candidates: Count = 1
    min_different_layers: Count = 1
    rivals: tuple[str, ...] = ("greedy", "depth", "uniform", "max_params")
    rivals_from: NonNegative = 2.0  # 0: rivals are always asked
    predicted_within: Annotated[float, Field(ge=1)] | None = 1.15  # twice what predictions were off: 7 % (root mean square)
    corrections: Annotated[int, Field(ge=0)] = 4
    without: tuple[str, ...] = ()
    distil_tokens: Annotated[int, Field(ge=0)] = 0
    race_rungs: Annotated[int, Field(ge=0, le=32)] = 0
    race_own: Count = 1
    race_within: Annotated[float, Field(ge=1)] = 1.5
    local_search_steps: Annotated[int, Field(ge=0)] = 0
    interaction_blocks: Annotated[int, Field(ge=0)] = 0  # pairs of so many blocks are measured, for the report alone
    measure_tokens: Count = 8_192
    sweep: dict[str, tuple[Positive, ...] | None] = {"speedup": (1.1, 1.25, 1.5, 1.75, 2.0)}
    sweep_measure: bool = False
    sweep_gkd: bool = False
    sweep_rungs: Count = 1

    @model_validator(mode="after")
    def _sweep_axes(self) -> SearchConfig:
        known = (*BUDGETS, *SCENARIO_AXES)
        for name, values in self.sweep.items():
            if name not in known:
                raise ValueError(f"sweep.{name} is no axis; {did_you_mean(name, known)}")
            if name in SCENARIO_AXES and any(value != int(value) for value in values or ()):
                raise ValueError(f"sweep.{name} = {list(values or ())}: give whole numbers")
        if not any(self.sweep.get(name) for name in BUDGETS):
            raise ValueError("sweep has no budget; give a limit's values, such as sweep: {speedup: [1.5, 2]}")
        if (self.distil_tokens or (self.without and not self.race_rungs)) and self.candidates < 2:
            name = "distil_tokens" if self.distil_tokens else "without"
            raise ValueError(f"{name} compares candidates, and there is one; set search.candidates to 2 or more, or leave it out")
        if self.sweep_rungs > 1 and not self.sweep_gkd:
            raise ValueError(
                f"sweep_rungs={self.sweep_rungs} is about distilled children; set search.sweep_gkd=true, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_race(self) -> SearchConfig:
        if not self.race_rungs:
            return self
        if self.distil_tokens:
            problem = (
                f"race_rungs={self.race_rungs} and distil_tokens={self.distil_tokens} both distil children before one is picked"
            )
            raise ValueError(f"{problem}; set one of them to 0")
        if self.race_rungs == 1:
            raise ValueError("race_rungs=1 is the end alone, where nobody stops; set search.race_rungs to 2 or more, or to 0")
        if self.race_own > (own := self.candidates + self.second_order[1] + bool(self.local_search_steps)):
            problem = f"race_own={self.race_own} of the searcher's answers are to race, and at most {own} are measured"
            raise ValueError(f"{problem}; raise search.candidates={self.candidates}, or lower search.race_own")
        if self.most_racing < 2:
            problem = f"race_rungs={self.race_rungs} lets children race, and there is one"
            raise ValueError(f"{problem}; raise search.race_own and search.candidates, or name search.rivals or search.without")
        return self

    @property
    def measures(self) -> bool:
        """Whether children are measured before one is picked."""
        return self.candidates > 1 or self.local_search_steps > 0 or self.race_rungs > 0

    @property
    def distils(self) -> bool:
        """Whether children are distilled before one is picked."""
        return self.distil_tokens > 0 or self.race_rungs > 0

    @property
    def most_racing(self) -> int:
        """Children that race before one is picked, at the most."""
        return self.race_own + len(self.without) + len(set(self.rivals) - {self.searcher})

    @property
    def second_order(self) -> tuple[float | None, int]:
        """`predicted_within` and `corrections`, as far as what counts is the KL before distillation."""
        if self.distil_tokens:
            return None, 0
        return None if self.race_rungs else self.predicted_within, self.corrections

    @property
    def most_candidates(self) -> int:
        """Children that are measured before one is picked, at the most: those of rivals, and what a local search finds, too."""
        most = self.candidates + len(self.without) + len(self.rivals) + bool(self.local_search_steps)
        return most + self.second_order[1]

    @property
    def most_distilled(self) -> int:
        """Children that are distilled before one is picked, at the most."""
        return self.most_racing if self.race_rungs else self.most_candidates

    @property
    def grid(self) -> dict[str, tuple[float, ...]]:
        """The sweep's axes. Axes without values are left out."""
        return {name: values for name, values in self.sweep.items() if values}

    @property
    def picked_by_tokens(self) -> int:
        """Held-out tokens that whole children are measured on; 0 where none is measured."""
        return self.measure_tokens if self.measures or self.sweep_measure else 0

    def identity(self) -> dict[str, Any]:
        """The settings that one budget's answer depends on. The target format is in the search space."""
        racing = {"race_rungs", "race_own", "race_within"}
        only_measured = {
            "candidates",
            "min_different_layers",
            "rivals",
            "rivals_from",
            "without",
            "distil_tokens",
            *racing,
            "local_search_steps",
            "interaction_blocks",
            "measure_tokens",
        }
        without_effect = {"sweep", "sweep_measure", "sweep_gkd", "sweep_rungs", "target_format"}
        without_effect |= set() if self.measures else only_measured
        without_effect |= set() if self.race_rungs else racing
        without_effect |= set() if self.interaction_blocks else {"interaction_blocks"}
        second_order = zip(("predicted_within", "corrections"), self.second_order, strict=True)
        without_effect |= {name for name, value in second_order if not (self.measures and value)}
        return self.model_dump(mode="json", exclude=without_effect)

    def sweep_identity(self) -> dict[str, Any]:
        """The settings that a sweep depends on: not the run's own budget, but what it fixes for all budgets."""
        whole = dict.fromkeys(("searcher", "time_limit_s", "sweep", "sweep_measure"), True)
        whole |= {"measure_tokens": True} if self.sweep_measure else {}
        whole |= {"candidates": True, "min_different_layers": True} if self.sweep_rungs > 1 else {}
        return self.model_dump(mode="json", include=whole | {"limits": {"fixed", "agree"}})

"""What a user asks of a child: limits on its cost, and choices that are fixed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from puzzle_ray.plugins import did_you_mean
from puzzle_ray.settings import Section

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
SPEEDS = ("speedup", "throughput_tokens_per_s")
SCENARIO_AXES = ("batch_size", "input_tokens", "output_tokens")  # what a sweep may vary besides limits
NO_LIMITS = ("fixed", "agree", "at_least")


class FixedChoice(Section):
    """The variants of one layer that the user has decided. A half that is left out stays free."""

    attention: str | None = None
    ffn: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> FixedChoice:
        if self.attention is None and self.ffn is None:
            raise ValueError("fixes nothing; name an attention variant, an ffn variant or both: {attention: parent}")
        return self


class Limits(Section):
    """Upper limits on cost and lower limits on speed in the serving scenario. All of them hold at once.

    - `speedup`: the child's predicted throughput over the parent's. At one batch size that is the parent's runtime over the child's.
    - `latency_ms`: the runtime of the whole scenario. `prefill_ms`: the time to the first token. `decode_ms`: one step of the batch.
    - `memory_mib`: weights and KV cache of the whole batch. `kv_cache_mib`: that cache alone.
    - `params`: parameters, embeddings and head included. `kv_heads`: KV heads, summed over layers.
    - `*_fraction`: relative to the parent at the scenario's batch size.
    - A cost may be a range `[min, max]`. That is short for the maximum and an entry in `at_least`.
    - `fixed` maps a layer to what it must be. Every group of layers in `agree` takes one and the same choice.
    """

    speedup: PositiveFloat | None = None
    throughput_tokens_per_s: PositiveFloat | None = None
    latency_ms: PositiveFloat | None = None
    latency_fraction: Fraction | None = None
    prefill_ms: PositiveFloat | None = None
    decode_ms: PositiveFloat | None = None
    memory_mib: PositiveFloat | None = None
    memory_fraction: Fraction | None = None
    params: PositiveInt | None = None
    params_fraction: Fraction | None = None
    kv_heads: PositiveInt | None = None
    kv_cache_mib: PositiveFloat | None = None
    at_least: dict[str, PositiveFloat] = Field(default_factory=dict)
    fixed: dict[NonNegativeInt, FixedChoice] = Field(default_factory=dict)
    agree: tuple[tuple[NonNegativeInt, ...], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _ranges(cls, values: Any) -> Any:
        """`cost: [min, max]` becomes `cost: max` and `at_least: {cost: min}`. Either end may be null."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        at_least = values.get("at_least") or {}
        if not isinstance(at_least, dict):
            return values
        at_least = dict(at_least)
        for name, value in list(values.items()):
            if name in NO_LIMITS or not isinstance(value, list | tuple):
                continue
            if name in SPEEDS or len(value) != 2:
                raise ValueError(f"{name} = {list(value)}: a range is [min, max] of a cost, such as latency_ms or params")
            if value[0] is not None:
                at_least[name] = value[0]
            values[name] = value[1]
        return values | {"at_least": at_least}

    @model_validator(mode="after")
    def _limits_something(self) -> Limits:
        if not self.asked:
            names = ", ".join(name for name in type(self).model_fields if name not in NO_LIMITS)
            raise ValueError(f"no limit is given, so the parent itself is the answer; give at least one of {names}")
        for name, least in self.at_least.items():
            if name not in COSTS:
                raise ValueError(f"at_least.{name} is no cost; {did_you_mean(name, COSTS)}")
            if least > self.asked.get(name, least):
                raise ValueError(f"{name} must be at least {least:g} and at most {self.asked[name]:g}; swap them")
        grouped = [layer for group in self.agree for layer in group]
        if len(set(grouped)) != len(grouped) or any(len(group) < 2 for group in self.agree):
            groups = [list(group) for group in self.agree]
            raise ValueError(f"agree = {groups}: every group needs two layers or more, and a layer may be in only one")
        return self

    @property
    def asked(self) -> dict[str, float]:
        """The limits that are given, by name. The minimums of ranges are in `at_least`."""
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        return {n: float(v) for n, v in values.items() if n not in NO_LIMITS and v is not None}


BUDGETS = tuple(name for name in Limits.model_fields if name not in NO_LIMITS)
COSTS = tuple(name for name in BUDGETS if name not in SPEEDS)

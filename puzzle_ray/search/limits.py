"""What the user asks of a child: limits on its cost, and what must not change."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


class FixedChoice(BaseModel):
    """A layer's variants that the user has decided; a part left out stays free."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: str | None = None
    ffn: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> FixedChoice:
        if self.attention is None and self.ffn is None:
            raise ValueError("fixes nothing; name an attention variant, an ffn variant or both: {attention: parent}")
        return self


class Limits(BaseModel):
    """Upper limits on cost and lower limits on speed, in the serving scenario; all of them hold at once.

    `speedup` is the ratio of the child's predicted throughput to the parent's (at one batch size: of the parent's
    runtime to the child's). `latency_ms` is the runtime of the whole scenario, `prefill_ms` the time to the first
    token, `decode_ms` one step of the whole batch, `memory_mib` weights and KV cache of the whole batch, `params`
    counts embeddings and head too. A `*_fraction` is relative to the parent at the scenario's batch size. `fixed`
    maps a layer to what it must be; every group of layers in `agree` takes one choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    fixed: dict[NonNegativeInt, FixedChoice] = Field(default_factory=dict)
    agree: tuple[tuple[NonNegativeInt, ...], ...] = ()

    @model_validator(mode="after")
    def _limits_something(self) -> Limits:
        if not self.asked:
            names = ", ".join(name for name in type(self).model_fields if name not in ("fixed", "agree"))
            raise ValueError(f"no limit is given, so the parent itself is the answer; give at least one of {names}")
        grouped = [layer for group in self.agree for layer in group]
        if len(set(grouped)) != len(grouped) or any(len(group) < 2 for group in self.agree):
            groups = [list(group) for group in self.agree]
            raise ValueError(f"agree = {groups}: every group needs two layers or more, and a layer may be in only one")
        return self

    @property
    def asked(self) -> dict[str, float]:
        """The limits that are given, by name."""
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        return {n: float(v) for n, v in values.items() if n not in ("fixed", "agree") and v is not None}

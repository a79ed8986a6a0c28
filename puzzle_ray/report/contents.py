"""What a report is made from. What a run has not produced yet stays empty, and its section is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from puzzle_ray.artifacts import (
    PARENT,
    Architecture,
    Choices,
    LayerChoice,
    LayerSpace,
    Profile,
    ProfileRow,
    Scenario,
    ScoreRow,
    Scores,
    SearchSpace,
    SubblockKind,
)
from puzzle_ray.distill.outliers import Conditioned
from puzzle_ray.search.measured import measured_kls

KIND_NAMES: Mapping[str, str] = {"attention": "Attention", "ffn": "FFN", "fixed": "Embedding, head, overhead"}
MODEL_NAMES: Mapping[str, str] = {"parent": "Parent", "child_before_gkd": "Child before GKD", "child": "Child"}
UNITS = {"kl": "KL to the parent, nats per token", "lm_loss": "rise of the loss, nats per token"}


class TrainedVariant(Conditioned, Protocol):
    """A row of the block library. Losses are normalised MSE.

    `kept` is `trained` or `start`. `tokens_saved` is above 0 after an early stop. `kind` is `block` for a coupled pair, whose `variant`
    names both halves. The last four are as in `puzzle_ray.distill.conditioning`.
    """

    @property
    def layer(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def initialisation(self) -> str: ...
    @property
    def start_loss(self) -> float: ...
    @property
    def final_loss(self) -> float: ...
    @property
    def kept(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def failure(self) -> str: ...
    @property
    def tokens_saved(self) -> int: ...


@dataclass(frozen=True)
class SweepPoint:
    """One budget of a sweep, and its architecture, or why there is none.

    `label` names the budget where it is more than a speed-up. `measured_kl` is the KL of the whole child, and `distilled_kl` its KL
    after GKD, where they were measured.
    """

    speedup_asked: float | None
    architecture: Architecture | None = None
    why_none: str | None = None
    label: str = ""
    measured_kl: float | None = None
    distilled_kl: float | None = None

    @property
    def asked(self) -> str:
        plain = self.speedup_asked is not None and self.label in ("", f"{self.speedup_asked:g} x")
        return f"{self.speedup_asked:g}\u00a0×" if plain else self.label


@dataclass(frozen=True)
class ReportData:
    """The data of one run.

    `num_key_value_heads` and `intermediate_size` are the parent's. `round` is the one that `space`, `scores`, `library`, `architecture` and
    `picked` are of: in a later one they are about the child of the one before, while sweep and evaluation are about the original.
    `bld_curves`: (layer, kind, variant) -> loss per micro-batch. `gkd_curve`: rows with `step` and any of `loss`, `kl`, `cosine`, `lm`.
    `picked`: what the pick measured, see `puzzle_ray.search.pick.pick`; empty where it measured nothing.
    `gkd_facts` are those of its artifact, `gkd_looks` the looks at held-out text: rows with `step`, `kl` and `returned`.
    `evaluation` is what `puzzle_ray.evaluation.evaluate` returns: `models` (`parent`, `child_before_gkd`, `child` ... -> figures),
    `predicted_speedup`, `measured_speedup`, `prompt` and `samples` (model -> text), and `heldout` (part -> which of the held-out
    sequences it has). `quality` is what `puzzle_ray.evaluation.quality`
    finds out.
    """

    parent: str
    round: int = 1
    scenario: Scenario | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    space: SearchSpace | None = None
    text_sources: Sequence[Mapping[str, Any]] = ()  # as the tokens' record has them
    profile: Profile | None = None
    scores: Scores | None = None
    architecture: Architecture | None = None
    sweep: Sequence[SweepPoint] = ()
    picked: Mapping[str, Any] = field(default_factory=dict)
    library: Sequence[TrainedVariant] = ()
    bld_curves: Mapping[tuple[int, str, str], Sequence[float]] = field(default_factory=dict)
    gkd_curve: Sequence[Mapping[str, float]] = ()
    gkd_facts: Mapping[str, Any] = field(default_factory=dict)
    gkd_looks: Sequence[Mapping[str, float]] = ()
    evaluation: Mapping[str, Any] | None = None
    quality: Mapping[str, Any] | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    config_yaml: str = ""
    versions: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)

    @property
    def models(self) -> Mapping[str, Mapping[str, float]]:
        """The figures of evaluated models, by name. Empty before the evaluation."""
        models: Mapping[str, Mapping[str, float]] = (self.evaluation or {}).get("models", {})
        return models

    @cached_property
    def measured_kls(self) -> dict[Choices, float]:
        """The choices of a whole child -> its KL, as far as the pick measured it."""
        return measured_kls(self.picked)

    def kl(self, point: SweepPoint) -> float | None:
        """The KL of the whole child that answers a budget, where the sweep or the pick measured it.

        A later round's pick measured children of another parent, by the same names.
        """
        if point.measured_kl is not None or point.architecture is None or self.round > 1:
            return point.measured_kl
        return self.measured_kls.get(point.architecture.choices)

    @property
    def metric(self) -> str:
        if self.architecture:
            return self.architecture.metric
        return self.scores.rows[0].metric if self.scores and self.scores.rows else "kl"

    @property
    def unit(self) -> str:
        return UNITS.get(self.metric, self.metric)

    @property
    def estimated(self) -> bool:
        """Whether costs were estimated instead of measured."""
        return bool((self.profile and self.profile.estimated) or (self.architecture and self.architecture.estimated))

    @property
    def engine(self) -> str:
        """The profile's engine with its version, named once."""
        profile = self.profile
        if profile is None:
            return ""
        named = profile.engine_version.startswith(profile.engine)
        return profile.engine_version if named else f"{profile.engine} {profile.engine_version}".strip()

    @property
    def costs_are(self) -> str:
        return "estimated" if self.estimated else "predicted"

    @property
    def serving(self) -> str:
        s = self.scenario
        if s is None:
            return ""
        kinds = f" on average of {len(s.lengths)} kinds of requests" if s.lengths else ""
        return f"batch {s.batch_size}, {s.input_tokens:g} tokens in, {s.output_tokens:g} out{kinds}"

    def chosen(self, layer: int, kind: SubblockKind) -> str | None:
        return self.architecture.choices[layer].variant(kind) if self.architecture else None

    def score(self, layer: int, kind: SubblockKind, variant: str) -> float | None:
        """The damage of replacing this subblock alone. None where it was not scored."""
        if self.scores is None:
            return None
        try:
            return self.scores.value(layer, _alone(kind, variant), self.metric)
        except KeyError:
            return None

    def score_row(self, layer: int, kind: SubblockKind, variant: str) -> ScoreRow | None:
        choice = _alone(kind, variant)
        return self._score_rows.get((layer, choice.attention, choice.ffn))

    @cached_property
    def _score_rows(self) -> dict[tuple[int, str, str], ScoreRow]:
        rows = self.scores.rows if self.scores else ()
        return {(r.layer, r.attention, r.ffn): r for r in rows if r.metric == self.metric}

    def cost(self, layer: int, kind: SubblockKind, variant: str) -> ProfileRow | None:
        """The cost of a subblock at the architecture's batch size. None where it was not profiled."""
        if self.profile is None or self.architecture is None:
            return None
        own = self.space.layers[layer] if self.space else LayerSpace((PARENT,), (PARENT,))
        name = own.now.variant(kind) if variant == PARENT else variant
        try:
            return self.profile.row(own.layer_type, kind, name, self.architecture.predicted.batch_size)
        except KeyError:
            return None

    def share_kept(self, layer: int, kind: SubblockKind, variant: str) -> float | None:
        """The share of KV heads or FFN channels kept, 0 to 1. For other variants, the share of parameters. None if unknown."""
        if variant in (PARENT, "noop"):
            return float(variant == PARENT)
        head, _, argument = variant.partition(":")
        whole = {"gqa": self.num_key_value_heads, "ffn": self.intermediate_size}.get(head)
        if whole and argument.isdigit():
            return int(argument) / whole
        own, parent = self.cost(layer, kind, variant), self.cost(layer, kind, PARENT)
        return min(1.0, own.num_params / parent.num_params) if own and parent and parent.num_params else None


def _alone(kind: SubblockKind, variant: str) -> LayerChoice:
    return LayerChoice(attention=variant) if kind == "attention" else LayerChoice(ffn=variant)


def shown(variant: str) -> str:
    return "no-op" if variant == "noop" else variant


def runtime_ms(cost: ProfileRow) -> float:
    """A subblock's time in serving a whole batch: the prefill, which gives the first token, and a decode step for every other."""
    return cost.prefill_ms + (cost.output_tokens - 1) * cost.decode_ms

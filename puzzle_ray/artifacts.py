"""The data that stages pass to each other, and its files: JSON for small structures, parquet for tables. All of it is immutable."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from puzzle_ray.rows import rows_from_parquet, rows_to_parquet

SubblockKind = Literal["attention", "ffn"]
KINDS: tuple[SubblockKind, ...] = ("attention", "ffn")
PARENT = "parent"
NOOP = "noop"
BLOCK = "block"  # the kind of a coupled pair
MIB = 1024.0 * 1024.0


def to_json(value: object) -> bytes:
    """A dataclass as readable JSON."""
    return json.dumps(asdict(value), indent=1).encode()  # type: ignore[call-overload]


@dataclass(frozen=True)
class LayerChoice:
    """What one layer becomes: the names of its attention and FFN variants, such as `gqa:2` and `ffn:384`."""

    attention: str = PARENT
    ffn: str = PARENT

    @classmethod
    def half(cls, kind: SubblockKind, variant: str) -> LayerChoice:
        """One subblock alone. The other one is a no-op, which adds nothing to the residual stream."""
        return cls(variant, NOOP) if kind == "attention" else cls(NOOP, variant)

    def variant(self, kind: SubblockKind) -> str:
        return self.attention if kind == "attention" else self.ffn

    def on(self, now: LayerChoice) -> LayerChoice:
        """The same choice counted from the original model, for a layer of a child that is `now` already."""
        return LayerChoice(*(now.variant(kind) if self.variant(kind) == PARENT else self.variant(kind) for kind in KINDS))

    @property
    def replaced(self) -> tuple[SubblockKind, ...]:
        """The subblocks that are not the parent's own."""
        return tuple(kind for kind in KINDS if self.variant(kind) != PARENT)

    @property
    def label(self) -> str:
        return f"{self.attention} + {self.ffn}"


# what every layer of a whole child becomes
Choices = tuple[LayerChoice, ...]


@dataclass(frozen=True)
class LayerSpace:
    """The variants that one layer may have. Both lists contain `parent`.

    `layer_type` distinguishes layers of different kinds of attention, as in transformers. Where `coupled` is true, attention and FFN
    of a pair are trained together, and a half of a pair has no weights of its own outside that pair. Where the parent is a child itself,
    `now` is what this layer of it was made of, counted from the original model; names of variants mean the same shapes for both.
    """

    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    layer_type: str = "full_attention"
    coupled: bool = False
    now: LayerChoice = LayerChoice()

    def variants(self, kind: SubblockKind) -> tuple[str, ...]:
        return self.attention if kind == "attention" else self.ffn

    @cached_property
    def choices(self) -> tuple[LayerChoice, ...]:
        """Every (attention, FFN) pair, the parent's own first."""
        pairs = [LayerChoice(a, f) for a in self.attention for f in self.ffn]
        return tuple(sorted(pairs, key=lambda choice: choice != LayerChoice()))

    @cached_property
    def trained(self) -> tuple[LayerChoice, ...]:
        """The choices that a block library trains: every variant beside the parent's other half or, if `coupled`, every pair."""
        if self.coupled:
            return tuple(choice for choice in self.choices if choice != LayerChoice())
        return tuple(LayerChoice(**{kind: name}) for kind in KINDS for name in self.variants(kind) if name != PARENT)

    def entry(self, choice: LayerChoice) -> tuple[str, str]:
        """(kind, variant) of a trained choice in a library's tables. For a coupled pair it is (`block`, the pair's label)."""
        if self.coupled:
            return BLOCK, choice.label
        return choice.replaced[0], choice.variant(choice.replaced[0])


@dataclass(frozen=True)
class SearchSpace:
    """The variants that every layer may have."""

    layers: tuple[LayerSpace, ...]

    @classmethod
    def from_json(cls, data: bytes) -> SearchSpace:
        """Layers of versions that knew no rounds do not say `now`."""
        layers = json.loads(data)["layers"]
        return cls(
            tuple(LayerSpace(**x | {k: tuple(x[k]) for k in KINDS} | {"now": LayerChoice(**x.get("now", {}))}) for x in layers)
        )

    def subblocks(self) -> Iterable[tuple[int, SubblockKind, str]]:
        """Every (layer, kind, variant) that is not the parent's own."""
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                for variant in layer.variants(kind):
                    if variant != PARENT:
                        yield index, kind, variant

    def entries(self) -> Iterable[tuple[int, str, str]]:
        """(layer, kind, variant) of every entry of a block library of this space, see `LayerSpace.entry`."""
        return ((index, *layer.entry(choice)) for index, layer in enumerate(self.layers) for choice in layer.trained)

    @property
    def now(self) -> Choices:
        """What every layer is already; empty where none is anything but the original's own."""
        found = tuple(layer.now for layer in self.layers)
        return found if any(choice.replaced for choice in found) else ()

    @property
    def size(self) -> float:
        """The number of architectures."""
        product = 1.0
        for layer in self.layers:
            product *= len(layer.choices)
        return product


@dataclass(frozen=True)
class Lengths:
    """One kind of request: the lengths of its prompt and its answer, and its weight among all kinds."""

    input_tokens: int
    output_tokens: int
    weight: float = 1.0


@dataclass(frozen=True)
class Scenario:
    """The load of a server: `batch_size` sequences at a time, each with a prompt of `input_tokens` and `output_tokens` of answer.

    With `lengths`, requests differ in length. The two numbers of tokens are then means over requests, and so is every cost. Memory has
    to hold any batch, so every sequence has the KV cache of the longest one, unless `kv_tokens` says how many tokens it caches.
    """

    batch_size: int
    input_tokens: float
    output_tokens: float
    lengths: tuple[Lengths, ...] = ()
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for kind in (self, *self.lengths):
            for name in ("batch_size", "input_tokens", "output_tokens", "kv_tokens"):
                value = getattr(kind, name, None)
                if value is not None and value < 1:
                    raise ValueError(f"{name}={value} must be at least 1")
            if getattr(kind, "weight", 1.0) <= 0:
                raise ValueError(f"weight={getattr(kind, 'weight', 1.0)} must be above 0")

    @property
    def tokens_per_sequence(self) -> float:
        """Tokens of prompt and answer, on average."""
        return self.input_tokens + self.output_tokens

    @property
    def kv_tokens_per_sequence(self) -> int:
        """The number of tokens for which every sequence of the batch has room in the KV cache."""
        return self.kv_tokens or self.longest_tokens

    @property
    def longest_tokens(self) -> int:
        """Tokens of prompt and answer of the longest request."""
        return int(max(kind.input_tokens + kind.output_tokens for kind in (self.lengths or (self,))))

    @property
    def shapes(self) -> tuple[tuple[Scenario, float], ...]:
        """The scenarios of one length that this one is made of, each with its share of all requests."""
        whole = math.fsum(kind.weight for kind in self.lengths)
        scenarios = ((Scenario(self.batch_size, x.input_tokens, x.output_tokens), x.weight / whole) for x in self.lengths)
        return tuple(scenarios) or ((self, 1.0),)


@dataclass(frozen=True)
class ProfileRow:
    """Cost of one subblock shape in one scenario. `subblock` is `attention`, `ffn`, or `fixed` (embedding, head, per-step overhead).

    `prefill_ms` is the time for the prompts of the whole batch. `decode_ms` is the time for one step of the whole batch. The
    `*_spread_ms` are half the inter-quartile range of the repeats. `kv_bytes_per_token` is per token of one sequence. Where requests
    differ in length, numbers of tokens are means. `estimated` says that the times were computed and not measured.
    """

    layer_type: str
    subblock: str
    variant: str
    batch_size: int
    input_tokens: float
    output_tokens: float
    prefill_ms: float
    decode_ms: float
    prefill_spread_ms: float
    decode_spread_ms: float
    weight_bytes: int
    kv_bytes_per_token: int
    num_params: int
    estimated: bool = False


FIXED = "fixed"


@dataclass(frozen=True)
class Profile:
    """The cost of every subblock shape on one device with one engine. `estimated`: computed, not measured."""

    rows: tuple[ProfileRow, ...]
    engine: str
    engine_version: str
    device: str
    dtype: str
    estimated: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, str, int], ProfileRow]:
        return {(r.layer_type, r.subblock, r.variant, r.batch_size): r for r in self.rows}

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({row.batch_size for row in self.rows}))

    def row(self, layer_type: str, kind: SubblockKind, variant: str, batch_size: int) -> ProfileRow:
        """The cost of one subblock. Raises KeyError where it was not profiled."""
        return self._by_key[layer_type, kind, variant, batch_size]

    def fixed(self, batch_size: int) -> ProfileRow:
        """The cost of embedding, final norm and head, and of a step besides its layers."""
        return self._by_key["", FIXED, FIXED, batch_size]

    def with_details(self, more: Mapping[str, Any]) -> Profile:
        """The same with further details, such as the memory that a device has."""
        return replace(self, details={**self.details, **more})

    def to_parquet(self) -> bytes:
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return rows_to_parquet(self.rows, ProfileRow, about | {"details": dict(self.details)})

    @classmethod
    def from_parquet(cls, data: bytes) -> Profile:
        rows, about = rows_from_parquet(data, ProfileRow)
        return cls(rows, **about)


@dataclass(frozen=True)
class ScoreRow:
    """The damage of replacing one layer by (attention, ffn), as a difference from the parent. 0 is no damage. (Paper v5, section 4.2.)

    `stderr` is the standard error over sequences. `tokens` is the number of tokens it was measured on; 0 marks a value that is
    calibrated from an estimate.
    """

    layer: int
    attention: str
    ffn: str
    metric: str
    value: float
    stderr: float
    tokens: int


@dataclass(frozen=True)
class Scores:
    """Replace-one scores.

    With granularity `block` every pair of variants has a score of its own. With `subblock` only the pairs (a, parent) and (parent, f)
    have one, and the score of (a, f) is their sum.
    """

    rows: tuple[ScoreRow, ...]
    granularity: Literal["block", "subblock"]

    @cached_property
    def _by_key(self) -> dict[tuple[int, str, str, str], ScoreRow]:
        return {(r.layer, r.attention, r.ffn, r.metric): r for r in self.rows}

    def value(self, layer: int, choice: LayerChoice, metric: str) -> float:
        """The score of `choice` at `layer`; 0 for the parent's own block. Raises KeyError where it was not scored."""
        return math.fsum(row.value for row in self.parts(layer, choice, metric))

    def parts(self, layer: int, choice: LayerChoice, metric: str) -> tuple[ScoreRow, ...]:
        """The rows whose values add up to the score of `choice`: none for the parent's own block, else its own row or those of its halves.

        Raises KeyError where it was not scored.
        """
        if choice == LayerChoice():
            return ()
        own = self._by_key.get((layer, choice.attention, choice.ffn, metric))
        if own is not None:
            return (own,)
        if self.granularity == "block" or PARENT in (choice.attention, choice.ffn):
            raise KeyError((layer, choice, metric))
        halves = (LayerChoice(attention=choice.attention), LayerChoice(ffn=choice.ffn))
        return tuple(row for half in halves for row in self.parts(layer, half, metric))

    def to_parquet(self) -> bytes:
        return rows_to_parquet(self.rows, ScoreRow, {"granularity": self.granularity})

    @classmethod
    def from_parquet(cls, data: bytes) -> Scores:
        rows, about = rows_from_parquet(data, ScoreRow)
        return cls(rows, about["granularity"])


@dataclass(frozen=True)
class Costs:
    """The cost of a whole model in one scenario, summed from a profile or measured. Throughput counts input and output tokens."""

    batch_size: int
    prefill_ms: float
    decode_ms: float
    runtime_ms: float
    throughput_tokens_per_s: float
    memory_mib: float
    num_params: int


@dataclass(frozen=True)
class Architecture:
    """One choice per layer, with its predicted cost and what the search proves about it.

    `objective` is the sum of scores and `bound` a proven lower bound on it. `status` is `optimal`, `feasible` (the search reached its
    time limit), `heuristic` (the searcher proves nothing) or `measured` (picked among several by measurement). At the batch sizes
    `unsolved_batch_sizes` the time limit came before an answer was found. `bound` holds for them too. `now`: what the parent's layers
    were already where that is a child itself, counted from the original model; empty for any other parent.
    """

    choices: tuple[LayerChoice, ...]
    searcher: str
    objective: float
    bound: float
    status: str
    solve_s: float
    predicted: Costs
    parent_predicted: Costs
    limits: Mapping[str, float] = field(default_factory=dict)
    metric: str = "kl"
    estimated: bool = False
    unsolved_batch_sizes: tuple[int, ...] = ()
    now: Choices = ()

    @property
    def gap(self) -> float:
        """Relative distance between the objective and its proven bound; 0 means proven optimal."""
        return abs(self.objective - self.bound) / max(abs(self.objective), 1e-12)

    @property
    def predicted_speedup(self) -> float:
        """The ratio of throughputs, child over parent. At the parent's batch size it is also the ratio of runtimes."""
        return self.predicted.throughput_tokens_per_s / self.parent_predicted.throughput_tokens_per_s

    @classmethod
    def from_json(cls, data: bytes) -> Architecture:
        raw = json.loads(data)
        raw["choices"] = tuple(LayerChoice(**choice) for choice in raw["choices"])
        raw["predicted"] = Costs(**raw["predicted"])
        raw["parent_predicted"] = Costs(**raw["parent_predicted"])
        raw["unsolved_batch_sizes"] = tuple(raw.get("unsolved_batch_sizes", ()))
        raw["now"] = tuple(LayerChoice(**choice) for choice in raw.get("now", ()))
        return cls(**raw)


@dataclass(frozen=True)
class Measured:
    """A whole child compared with the parent on held-out text.

    `kl` is KL(parent || child) in nats per token, and `stderr` its standard error over sequences. `lm_loss` is the child's next-token
    loss minus the parent's, in nats per token. `top1_agreement` is the share of positions with the same most probable token.
    """

    kl: float
    stderr: float
    lm_loss: float
    top1_agreement: float
    tokens: int


# measures whole children, in order
Measure = Callable[[Sequence[Choices]], list[Measured]]

"""What passes between stages, and its files: JSON for small structures, parquet for tables. Nothing here is mutable."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

SubblockKind = Literal["attention", "ffn"]
KINDS: tuple[SubblockKind, ...] = ("attention", "ffn")
PARENT = "parent"
MIB = 1024.0 * 1024.0
Row = TypeVar("Row")


def to_json(value: object) -> bytes:
    """A dataclass as readable JSON."""
    return json.dumps(asdict(value), indent=1).encode()  # type: ignore[call-overload]


def rows_to_parquet(rows: Sequence[object], kind: type[object], metadata: Mapping[str, object]) -> bytes:
    """Rows of one flat dataclass as a parquet file; `metadata` is kept as JSON in its schema."""
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(kind)}  # type: ignore[arg-type]
    table = pa.table(columns).replace_schema_metadata({"puzzle_ray": json.dumps(metadata)})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def rows_from_parquet(data: bytes, kind: type[Row]) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """The inverse of `rows_to_parquet`."""
    table = pq.read_table(io.BytesIO(data))
    metadata = json.loads((table.schema.metadata or {}).get(b"puzzle_ray", b"{}"))
    return tuple(kind(**row) for row in table.to_pylist()), metadata


@dataclass(frozen=True)
class LayerChoice:
    """What one layer becomes: the names of its attention and FFN variants, such as `gqa:2` and `ffn:384`."""

    attention: str = PARENT
    ffn: str = PARENT

    def variant(self, kind: SubblockKind) -> str:
        return self.attention if kind == "attention" else self.ffn

    @property
    def label(self) -> str:
        return f"{self.attention} + {self.ffn}"


@dataclass(frozen=True)
class LayerSpace:
    """The variants one layer may take; both lists contain `parent`. `layer_type` tells layers of differing shape apart."""

    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    layer_type: str = "full_attention"

    def variants(self, kind: SubblockKind) -> tuple[str, ...]:
        return self.attention if kind == "attention" else self.ffn

    @cached_property
    def choices(self) -> tuple[LayerChoice, ...]:
        """Every (attention, FFN) pair, the parent's own first."""
        pairs = [LayerChoice(a, f) for a in self.attention for f in self.ffn]
        return tuple(sorted(pairs, key=lambda choice: choice != LayerChoice()))


@dataclass(frozen=True)
class SearchSpace:
    """For every layer, what it may become."""

    layers: tuple[LayerSpace, ...]

    @classmethod
    def from_json(cls, data: bytes) -> SearchSpace:
        raw = json.loads(data)
        return cls(
            tuple(LayerSpace(tuple(x["attention"]), tuple(x["ffn"]), x["layer_type"]) for x in raw["layers"]),
        )

    def subblocks(self) -> Iterable[tuple[int, SubblockKind, str]]:
        """Every (layer, kind, variant) that is not the parent's own."""
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                for variant in layer.variants(kind):
                    if variant != PARENT:
                        yield index, kind, variant

    @property
    def size(self) -> float:
        """How many architectures there are."""
        product = 1.0
        for layer in self.layers:
            product *= len(layer.choices)
        return product


@dataclass(frozen=True)
class Scenario:
    """What is served: `batch_size` sequences at once, each `input_tokens` long, until `output_tokens` more are generated."""

    batch_size: int
    input_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def tokens_per_sequence(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class ProfileRow:
    """Cost of one subblock shape in one scenario. `subblock` is `attention`, `ffn`, or `fixed` (embedding, head, per-step overhead).

    `prefill_ms`: the whole batch's prompts; `decode_ms`: one step of the whole batch; `*_spread_ms`: half the
    inter-quartile range of the repeats; `kv_bytes_per_token`: per token of one sequence.
    """

    layer_type: str
    subblock: str
    variant: str
    batch_size: int
    input_tokens: int
    output_tokens: int
    prefill_ms: float
    decode_ms: float
    prefill_spread_ms: float
    decode_spread_ms: float
    weight_bytes: int
    kv_bytes_per_token: int
    num_params: int


FIXED = "fixed"


@dataclass(frozen=True)
class Profile:
    """What every subblock shape costs on one device under one engine. `estimated`: computed, not measured."""

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
        """Embedding, final norm, head, and what a step costs besides its layers."""
        return self._by_key["", FIXED, FIXED, batch_size]

    def to_parquet(self) -> bytes:
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return rows_to_parquet(self.rows, ProfileRow, about | {"details": dict(self.details)})

    @classmethod
    def from_parquet(cls, data: bytes) -> Profile:
        rows, about = rows_from_parquet(data, ProfileRow)
        return cls(rows, **about)


@dataclass(frozen=True)
class ScoreRow:
    """Damage done by replacing one layer with (attention, ffn), as a difference from the parent; 0 is no damage.

    `stderr` is the standard error over sequences; `tokens` the number of predicted tokens it was measured on.
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
    """Replace-one scores. `granularity` `block`: every pair was measured; `subblock`: (a, parent) and (parent, f) were, pairs are sums."""

    rows: tuple[ScoreRow, ...]
    granularity: Literal["block", "subblock"]

    @cached_property
    def _by_key(self) -> dict[tuple[int, str, str, str], ScoreRow]:
        return {(r.layer, r.attention, r.ffn, r.metric): r for r in self.rows}

    def value(self, layer: int, choice: LayerChoice, metric: str) -> float:
        """The score of `choice` at `layer`, 0 for the parent's own. Raises KeyError where it was not scored."""
        if choice == LayerChoice():
            return 0.0
        exact = self._by_key.get((layer, choice.attention, choice.ffn, metric))
        if exact is not None:
            return exact.value
        if self.granularity == "block":
            raise KeyError((layer, choice, metric))
        return self.value(layer, LayerChoice(attention=choice.attention), metric) + self.value(
            layer, LayerChoice(ffn=choice.ffn), metric
        )

    def to_parquet(self) -> bytes:
        return rows_to_parquet(self.rows, ScoreRow, {"granularity": self.granularity})

    @classmethod
    def from_parquet(cls, data: bytes) -> Scores:
        rows, about = rows_from_parquet(data, ScoreRow)
        return cls(rows, about["granularity"])


@dataclass(frozen=True)
class Costs:
    """What a whole model costs in one scenario, summed from a profile (or measured). Throughput counts input and output tokens."""

    batch_size: int
    prefill_ms: float
    decode_ms: float
    runtime_ms: float
    throughput_tokens_per_s: float
    memory_mib: float
    num_params: int


@dataclass(frozen=True)
class Architecture:
    """One choice per layer, what it is predicted to cost, and how sure the search is of it.

    `objective` is the sum of scores, `bound` the proven lower bound on it, `status` `optimal`, `feasible` (a limit on time
    was hit), `heuristic` (the searcher proves nothing) or `measured` (picked by measurement among several).
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

    @property
    def gap(self) -> float:
        """Relative distance between the objective and its proven bound; 0 means proven optimal."""
        return abs(self.objective - self.bound) / max(abs(self.objective), 1e-12)

    @property
    def predicted_speedup(self) -> float:
        """Ratio of throughputs; at the parent's batch size, of runtimes."""
        return self.predicted.throughput_tokens_per_s / self.parent_predicted.throughput_tokens_per_s

    @classmethod
    def from_json(cls, data: bytes) -> Architecture:
        raw = json.loads(data)
        raw["choices"] = tuple(LayerChoice(**choice) for choice in raw["choices"])
        raw["predicted"] = Costs(**raw["predicted"])
        raw["parent_predicted"] = Costs(**raw["parent_predicted"])
        return cls(**raw)

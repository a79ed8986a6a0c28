"""Token shards: the tokens of a text as Arrow files of an artifact. No process holds more than a few of them.

A shard holds the tokens of one block of the text. Sequences are cut from the run of all shards, so that a block needs to know nothing of
the others. Where the store is a folder of this machine, shards are memory-mapped; else they are fetched one by one.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_ray.data.blocks import FlatTokens, ShardFacts
from puzzle_ray.data.order import TokenArray
from puzzle_ray.errors import DataError, StoreError
from puzzle_ray.store import Artifact

OPEN_SHARDS = 4  # of one split in a process
_META = b"puzzle_ray"


def shard_name(split: str, number: int) -> str:
    return f"{split}/{number:06d}.arrow"


def write_shard(artifact: Artifact, name: str, tokens: FlatTokens, facts: Mapping[str, Any]) -> None:
    """One shard with what is known of it, as JSON."""
    import pyarrow as pa

    column = pa.array(np.ascontiguousarray(tokens, dtype=np.int32))
    schema = pa.schema([("tokens", column.type)], metadata={_META: json.dumps(dict(facts))})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    artifact.write(name, sink.getvalue())


def _opened(source: Any, name: str) -> tuple[FlatTokens, dict[str, Any]]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(source)
        column = reader.get_batch(0).column(0)
        if pa.types.is_fixed_size_list(column.type):  # sequences, as earlier versions wrote them
            column = column.flatten()
        return column.to_numpy(zero_copy_only=True), json.loads(reader.schema.metadata[_META])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise StoreError("store", f"{name} is no token shard ({error})", "remove it, then run again") from None


def read_shard(artifact: Artifact, name: str) -> tuple[FlatTokens, dict[str, Any]]:
    """(tokens, what is known of them). Raises Damaged where they are not what was written."""
    import pyarrow as pa

    data = artifact.read(name)  # compared with the record
    if artifact.store.is_local:
        del data
        return _opened(pa.memory_map(artifact.path(name)), name)
    return _opened(pa.BufferReader(data), name)


@dataclass
class TokenShards:
    """The sequences of one split, `[sequences, sequence_length]`, read like an array: by rows or by a slice.

    `tokens` has the number of tokens of every shard. They are one run, of which a sequence may begin in one shard and end in another;
    `rows` is the run of sequences that belongs to the split.
    """

    artifact: Artifact
    split: str
    tokens: Sequence[int]
    length: int
    rows: tuple[int, int]
    _open: OrderedDict[int, FlatTokens] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.starts = np.array([0, *accumulate(self.tokens)], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.length

    @property
    def window(self) -> int:
        """How many sequences, one after the other, lie in few enough shards."""
        ended = np.diff(self.starts // self.length)  # sequences, in every shard
        return max(1, int(ended.max(initial=1)) * (OPEN_SHARDS - 1))

    def __getitem__(self, chosen: slice | npt.NDArray[np.int64]) -> TokenArray:
        rows = np.arange(*chosen.indices(len(self)), dtype=np.int64) if isinstance(chosen, slice) else np.asarray(chosen)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        firsts = (rows + self.rows[0]) * self.length
        shards = np.searchsorted(self.starts, firsts, side="right") - 1
        out = np.empty((len(rows), self.length), dtype=np.int32)
        for index in np.argsort(firsts, kind="stable"):
            self._fill(out[index], int(firsts[index]), int(shards[index]))
        return out

    def _fill(self, out: npt.NDArray[np.int32], first: int, shard: int) -> None:
        """One sequence, whose first token is in `shard`."""
        filled = 0
        while filled < self.length:
            begin = first + filled - int(self.starts[shard])
            part = self._shard(shard)[begin : begin + self.length - filled]
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1

    def _shard(self, number: int) -> FlatTokens:
        if number not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = read_shard(self.artifact, shard_name(self.split, number))[0]
        self._open.move_to_end(number)
        return self._open[number]


@dataclass(frozen=True)
class ArtifactShards:
    """Shards in an artifact that is not finished yet, of a tokenizer whose parent has an embedding of so many rows.

    `write` raises DataError for a token that has none.
    """

    artifact: Artifact
    tokenizer: Any
    vocab_size: int | None = None

    def write(self, split: str, number: int, tokens: FlatTokens, facts: ShardFacts) -> None:
        largest = int(tokens.max()) if tokens.size else 0
        if self.vocab_size is not None and largest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            problem = (
                f"the text has {token!r}, and the parent's embedding of {self.vocab_size} rows none for that token ({largest})"
            )
            raise DataError("data", problem, f"take {token!r} out of the text")
        write_shard(self.artifact, shard_name(split, number), tokens, facts.to_json())

    def read(self, split: str, number: int) -> ShardFacts | None:
        name = shard_name(split, number)
        return ShardFacts.from_json(read_shard(self.artifact, name)[1]) if self.artifact.exists(name) else None

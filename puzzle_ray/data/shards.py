"""Token shards: packed sequences as Arrow files of an artifact. No process holds more than a few of them.

A shard holds the sequences that one block of the text completes, and in its metadata the tokens that are left over: so the next
block is packed without reading what came before, and an interrupted run goes on behind the last shard. Where the store is a folder of
this machine, shards are memory-mapped; else they are fetched one by one.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_ray.data.order import TokenArray
from puzzle_ray.errors import StoreError
from puzzle_ray.store import Artifact

OPEN_SHARDS = 4  # of one split in a process
_META = b"puzzle_ray"


def shard_name(split: str, number: int) -> str:
    return f"{split}/{number:06d}.arrow"


def write_shard(artifact: Artifact, name: str, sequences: TokenArray, facts: dict[str, Any]) -> None:
    """One shard with what is known behind it, as JSON."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(sequences, dtype=np.int32).ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, sequences.shape[1])
    schema = pa.schema([("tokens", column.type)], metadata={_META: json.dumps(facts)})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    artifact.write(name, sink.getvalue())


def _opened(source: Any, name: str) -> tuple[TokenArray, dict[str, Any]]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(source)
        column = reader.get_batch(0).column(0)
        tokens = column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)
        return tokens, json.loads(reader.schema.metadata[_META])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise StoreError("store", f"{name} is no token shard ({error})", "remove it, then run again") from None


def read_shard(artifact: Artifact, name: str) -> tuple[TokenArray, dict[str, Any]]:
    """(sequences, what was known behind it). Raises Damaged where it is not what was written."""
    import pyarrow as pa

    data = artifact.read(name)  # compared with the record
    if artifact.store.is_local:
        del data
        return _opened(pa.memory_map(artifact.path(name)), name)
    return _opened(pa.BufferReader(data), name)


@dataclass
class TokenShards:
    """The sequences of one split, `[sequences, sequence_length]`, read like an array: by rows or by a slice.

    `counts` has the number of sequences of every shard; `rows` is the run of them that belongs to the split.
    """

    artifact: Artifact
    split: str
    counts: Sequence[int]
    length: int
    rows: tuple[int, int]
    _open: OrderedDict[int, TokenArray] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.starts = np.array([0, *accumulate(self.counts)], dtype=np.int64)

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
        return max(1, max(self.counts, default=1) * (OPEN_SHARDS - 1))

    def __getitem__(self, chosen: slice | npt.NDArray[np.int64]) -> TokenArray:
        rows = np.arange(*chosen.indices(len(self)), dtype=np.int64) if isinstance(chosen, slice) else np.asarray(chosen)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        rows = rows + self.rows[0]
        out = np.empty((len(rows), self.length), dtype=np.int32)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards):
            own = shards == shard
            out[own] = self._shard(int(shard))[rows[own] - self.starts[shard]]
        return out

    def _shard(self, number: int) -> TokenArray:
        if number not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = read_shard(self.artifact, shard_name(self.split, number))[0]
        self._open.move_to_end(number)
        return self._open[number]


@dataclass(frozen=True)
class ArtifactShards:
    """Shards in an artifact that is not finished yet. `look` is shown the sequences of each before it is written."""

    artifact: Artifact
    look: Callable[[TokenArray], None] = lambda sequences: None

    def write(self, split: str, number: int, sequences: TokenArray, behind: Mapping[str, Any]) -> None:
        self.look(sequences)
        write_shard(self.artifact, shard_name(split, number), sequences, dict(behind))

    def read(self, split: str, number: int) -> tuple[int, Mapping[str, Any]] | None:
        name = shard_name(split, number)
        if not self.artifact.exists(name):
            return None
        sequences, behind = read_shard(self.artifact, name)
        return len(sequences), behind

"""What is in flight in the object stores: the library's micro-batches, and text. Loads no Ray: it is asked before there is one."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_ray.data.blocks import BLOCK_CHARACTERS
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.sources import likely_characters
from puzzle_ray.distill.settings import LibraryConfig

OBJECT_OVERHEAD = 4096  # bytes at the most that Ray adds to an array
MANY_CHARACTERS = 4 * BLOCK_CHARACTERS  # of less text, starting workers takes longer than they save
MIB = 2**20


@dataclass(frozen=True)
class Flow:
    """What one micro-batch puts into the object stores, and how many are in flight."""

    window: int
    tokens: int
    hidden_size: int
    dtype_bytes: int
    has_positions: bool = False  # position ids go along, see `data.document_mask`

    @classmethod
    def of(cls, config: LibraryConfig, hidden_size: int, num_shards: int, has_positions: bool = False) -> Flow:
        dtype_bytes = 4 if config.activation_dtype == "float32" else 2
        return cls(config.in_flight(num_shards), config.micro_batch_tokens, hidden_size, dtype_bytes, has_positions)

    @property
    def state_bytes(self) -> int:
        """One hidden state, `[batch, tokens, hidden_size]`."""
        return self.tokens * self.hidden_size * self.dtype_bytes

    def bound_bytes(self, num_states: int) -> int:
        """In flight at the most, with `num_states` hidden states of each micro-batch: window x (states + token ids + position ids)."""
        ids = self.tokens * 8 + OBJECT_OVERHEAD
        ids += self.tokens * 4 + OBJECT_OVERHEAD if self.has_positions else 0
        return self.window * (num_states * (self.state_bytes + OBJECT_OVERHEAD) + ids)


def text_bytes(config: DataConfig, num_cpus: int) -> int:
    """The text that workers on so many CPUs have in flight, twice a block for each and two more; about a byte a character."""
    asked = config.tokenise_workers
    if asked == 0 or (asked == "auto" and likely_characters(config) < MANY_CHARACTERS):
        return 0
    workers = num_cpus if asked == "auto" else min(asked, num_cpus)
    return (2 * workers + 2) * BLOCK_CHARACTERS

"""What the library's micro-batches take of the object stores while they are in flight. Loads no Ray: it is asked before there is one."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_ray.distill.settings import LibraryConfig

OBJECT_OVERHEAD = 4096  # bytes at the most that Ray adds to an array
MIB = 2**20


@dataclass(frozen=True)
class Flow:
    """What one micro-batch puts into the object stores, and how many are in flight."""

    window: int
    tokens: int
    hidden_size: int
    dtype_bytes: int

    @classmethod
    def of(cls, config: LibraryConfig, hidden_size: int, num_shards: int) -> Flow:
        dtype_bytes = 4 if config.activation_dtype == "float32" else 2
        return cls(config.in_flight(num_shards), config.micro_batch_tokens, hidden_size, dtype_bytes)

    @property
    def state_bytes(self) -> int:
        """One hidden state, `[batch, tokens, hidden_size]`."""
        return self.tokens * self.hidden_size * self.dtype_bytes

    def bound_bytes(self, num_states: int) -> int:
        """In flight at the most, with `num_states` hidden states of each micro-batch: window x (states + token ids)."""
        ids = self.tokens * 8 + OBJECT_OVERHEAD
        return self.window * (num_states * (self.state_bytes + OBJECT_OVERHEAD) + ids)

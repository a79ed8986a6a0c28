"""What a process of a plan holds, and what a stage of it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Demand:
    """What each of `count` equal processes holds, in bytes by kind. With `gpu_share` it is in a GPU's memory, else in the host's.

    `host` is what it has in the host's memory beside that. `remedy` is for a process that does not fit, `fewer` for too many of them.
    Where `waits`, those that find no room wait for their turn. Where `in_turn`, and a single process finds a GPU, it does the work of all,
    one after the other.
    """

    stage: str
    process: str
    count: int
    parts: Mapping[str, int]
    gpu_share: float
    remedy: str
    fewer: str = "ask for fewer or for smaller shares"
    host: Mapping[str, int] = field(default_factory=dict)
    waits: bool = False
    in_turn: bool = False

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """Of each in the host's memory."""
        return sum(self.host.values()) + (0 if self.gpu_share else self.total)

    @property
    def at_once(self) -> int:
        """How many there are at the least at the same time."""
        return 1 if self.waits else self.count

    @property
    def words(self) -> str:
        return f"{self.count} x {self.process}"


@dataclass(frozen=True)
class Work:
    """What a stage computes, and what it writes while it runs."""

    stage: str
    flops: float
    dtype: str
    store_bytes_per_token: int = 0  # hidden states in the object stores, for every token of a micro-batch
    store_bytes: int = 0  # of them at a time
    checkpoint_bytes: int = 0
    gpus: float = 0  # that it uses at the most; 0: as many as there are
    on_gpus: bool = True  # False: its processes are given none, so that a GPU's rate says nothing of it

"""A config on its way to one that the hardware leaves nothing open in, and which settings that is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from puzzle_ray.config import RunConfig
from puzzle_ray.planning.hardware import Seen, room_bytes
from puzzle_ray.planning.needs import Demand

# Settings that a stage's key has, in the order in which they are decided. What a store's first run decided holds for the later ones.
IN_KEYS = (
    "cluster.gpus_per_shard",
    "cluster.gpus_per_trainer",
    "library.parent_dtype",
    "library.activation_dtype",
    "library.compute_dtype",
    "library.micro_batch_tokens",
    "library.learning_rate",
    "scoring.dtype",
    "scoring.micro_batch_tokens",
    "gkd.use_gpu",
    "gkd.num_workers",
    "gkd.micro_batch_tokens",
    "gkd.gradient_accumulation",
    "gkd.learning_rate",
)
AS_SHARES = IN_KEYS[:2]  # a key has only whether they are above 0
STEP = ("gkd.num_workers", "gkd.micro_batch_tokens", "gkd.gradient_accumulation")  # what a step of GKD is made of
DECIDED = (  # everything that is decided here; a profile is of its target, which is in its key, and is decided anew everywhere
    *IN_KEYS,
    *("profile.num_gpus", "profile.dtype", "profile.memory_mib"),
    "evaluate.num_shards",
    *("cluster.num_shards", "cluster.colocate", "gkd.min_workers", "gkd.activation_checkpointing"),
)


def value_of(config: RunConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def is_set(config: RunConfig, name: str) -> bool:
    """Whether a recipe, a file or `--set` says it."""
    section, _, key = name.partition(".")
    return key in getattr(config, section).model_fields_set


@dataclass
class Draft:
    """A config on its way. `kept` are values of `IN_KEYS` that an earlier run decided, `kept_by` says of each which run."""

    original: RunConfig
    kept: Mapping[str, Any]
    kept_by: Mapping[str, str]
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    decided: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.config = self.original

    def open(self, name: str) -> bool:
        """Whether the cluster decides it: neither the config does, nor did an earlier run."""
        return not is_set(self.original, name) and name not in self.decided and name not in self.kept

    def fixed(self, name: str) -> Any:
        """The value that it has whatever the cluster; None where it is open."""
        if is_set(self.original, name) or name in self.decided:
            return value_of(self.config, name)
        return self.kept.get(name)

    def decide(self, name: str, value: Any, why: str) -> Any:
        """Takes a value, unless the config says one, or an earlier run has decided. Returns what holds."""
        assert name in DECIDED
        if is_set(self.original, name) or name in self.decided:
            return value_of(self.config, name)
        if name in self.kept and (name not in AS_SHARES or bool(self.kept[name]) != bool(value)):
            value, why = self.kept[name], f"as {self.kept_by[name]}"
        self.put(name, value)
        self.decided.add(name)
        self.lines.append(f"{name} = {format(value, 'g') if isinstance(value, float) else value}: {why}")
        return value

    def leave(self, names: Iterable[str]) -> None:
        """Decides that these stay as they are, without a word."""
        self.decided |= {name for name in names if self.open(name)}

    def put(self, name: str, value: Any) -> None:
        """For a try, without a word."""
        section, _, key = name.partition(".")
        new = getattr(self.config, section).model_copy(update={key: value})
        self.config = self.config.model_copy(update={section: new})


def fitting(
    draft: Draft, choices: Iterable[tuple[str, int]], needed: Callable[[RunConfig], Iterable[Demand]], gpus: Seen
) -> Iterator[int]:
    """The values of one setting with which every process that is needed has room, in their order."""
    for name, value in choices:
        draft.put(name, value)
        if all(d.total <= room_bytes(gpus, d.gpu_share) for d in needed(draft.config) if d.gpu_share):
            yield value

"""What `hardware: auto` decided, and that it stays so: the store's note of it.

A stage is done again where its key changes, and its key has dtypes, micro-batches, the number of GKD's workers, and whether GPUs
computed. A run that goes on elsewhere must not decide them anew: finished work would not be found any more, or would be mixed with other
work. So the first run of a parent in a store notes these values in an artifact `hardware-KEY`, and every later run there takes them. Only
where things are placed is decided by the cluster that is there: shards, shares of a GPU, how many of GKD's workers start.

- What the config says itself wins over the note, and is said to change nothing else: the stages that depend on it are done again.
- Where the note does not suit the cluster that is there (GPUs that are missing, too little memory), this is said: finished stages are still
  found, and what is not finished waits for such nodes until `cluster.placement_timeout_s`.
- Whoever wants the cluster that is there to decide removes the note (the folder `hardware-KEY` of the store): it is written again.
- The profile is measured on the target that is there, and its key has that target: on other hardware it is made again, as ever.
- The note belongs to a parent (name and revision) and a length of sequences, whose change makes all stages anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_ray.config import HARDWARE, TINY, RunConfig
from puzzle_ray.export.target import configured_space
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.planning.resolve import Resolved, resolve
from puzzle_ray.profiling.nodes import Node, in_words, nodes_of
from puzzle_ray.recipes import tiny_parent
from puzzle_ray.store import Artifact, Store, do_once

STAGE = "hardware"


@dataclass(frozen=True)
class Settled:
    """A config for the cluster that is there, and what to say of it; one that has no `hardware` is as it was."""

    config: RunConfig
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def told(self) -> list[str]:
        """One line each."""
        return [f"hardware: {line}" for line in self.lines] + [f"hardware: WARNING: {line}" for line in self.warnings]


def config_of_parent(config: RunConfig) -> Any:
    """The parent's transformers config; of the tiny one, which may not be there yet, the one that it will have."""
    if config.parent == TINY:
        return tiny_parent.model_config(tiny_parent.TinyParentSpec())
    return read_config(locate(config.parent, config.revision), config.trust_remote_code)


def note_of(config: RunConfig, store: Store) -> Artifact:
    """Where a store keeps what was decided for a parent."""
    about = {"parent": config.parent, "revision": config.revision, "sequence_length": config.data.sequence_length}
    return store.artifact(STAGE, about, {})


def settle(config: RunConfig, model_config: Any, nodes: Sequence[Node], store: Store | None, notes: bool = True) -> Settled:
    """Decides what the config leaves to the hardware. `nodes` are those that are there; none where the config says them in words.

    With `notes` it is written down where the store has no note yet; without, or without a store, nothing is written.
    """
    if config.hardware is None:
        return Settled(config)
    if not nodes and config.hardware != HARDWARE:
        nodes = nodes_of(config.hardware)
    space = configured_space(model_config, config.space, config.search.target_format)
    note = None if store is None else note_of(config, store)
    found: list[Resolved] = []

    def decide(artifact: Artifact) -> None:
        found.append(resolve(config, model_config, space, nodes))
        artifact.finish({"values": found[0].in_keys(), "cluster": in_words(nodes)})

    if note is not None and notes:
        do_once(note, decide)
    if not found:
        known: dict[str, Any] = note.facts() if note is not None and note.finished else {}
        by = f"the first run in this store decided, on {known['cluster']}; {note.name} keeps it" if note and known else ""
        found.append(resolve(config, model_config, space, nodes, known.get("values"), by))
    resolved = found[0]
    return Settled(resolved.config, resolved.lines, resolved.warnings)

"""What `hardware: auto` decided, and that it stays so: the store's note of it.

A stage is done again where its key changes, and its key has dtypes, micro-batches, the number of GKD's workers, and whether GPUs
computed. A run that goes on elsewhere must not decide them anew: finished work would not be found any more, or would be mixed with other
work. So the first run of a parent in a store notes what it decided of them in an artifact `hardware-KEY`, and every later run there takes
it; the first run that trains by GKD notes GKD's in another. What a config says itself is not noted. Only
where things are placed is decided by the cluster that is there: shards, shares of a GPU, how many of GKD's workers start.

- What the config says itself wins over the note, and is said to change nothing else: the stages that depend on it are done again.
- Where the note does not suit the cluster that is there (GPUs that are missing, too little memory), this is said: finished stages are still
  found, and what is not finished waits for such nodes until `cluster.placement_timeout_s`.
- Whoever wants the cluster that is there to decide removes the note (the folders `hardware-KEY` of the store): it is written again.
- The profile is measured on the target that is there, and its key has that target: on other hardware it is made again, as ever. So
  nothing of it is noted.
- A `gkd.step_tokens`, or a part of a step, that the config says and the noted parts do not make: the parts are decided anew.
- The note belongs to a parent (name and revision), a length of sequences and `data.document_mask`, whose change makes all stages anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from puzzle_ray.config import HARDWARE, TINY, RunConfig
from puzzle_ray.export.target import configured_space
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.planning.draft import IN_KEYS
from puzzle_ray.planning.resolve import Resolved, resolve
from puzzle_ray.profiling.nodes import Node, in_words, nodes_of, this_machine
from puzzle_ray.recipes import tiny_parent
from puzzle_ray.store import Artifact, Store, do_once

STAGE, GKD = "hardware", "gkd"


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
    return read_config(locate(config.parent, config.revision))


def note_of(config: RunConfig, store: Store, part: str = "") -> Artifact:
    """Where a store keeps what was decided for a parent: of library and scores, or of the part `gkd`."""
    about = {"parent": config.parent, "revision": config.revision, "sequence_length": config.data.sequence_length}
    about |= config.data.mask_identity()
    return store.artifact(STAGE, about | ({"part": part} if part else {}), {})


def _of_part(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in IN_KEYS and name.startswith("gkd.") == (part == GKD)}


def settle(config: RunConfig, model_config: Any, nodes: Sequence[Node], store: Store | None, notes: bool = True) -> Settled:
    """Decides what the config leaves to the hardware. `nodes` are those that are there; none where the config says them in words.

    With `notes` it is written down where the store has no note yet; without, or without a store, nothing is written.
    """
    if config.hardware is None:
        return Settled(config)
    if not nodes and config.hardware != HARDWARE:
        nodes = nodes_of(config.hardware)
    space = configured_space(model_config, config.space, config.search.target_format)
    parts = ["", GKD] if config.gkd.trains else [""]
    known = {} if store is None else {part: note_of(config, store, part) for part in parts}

    def decided() -> Resolved:
        kept: dict[str, Any] = {}
        by: dict[str, str] = {}
        for part, note in known.items():
            if note.finished:
                facts: Mapping[str, Any] = note.facts()
                values = _of_part(facts["values"], part)
                words = f"the first run in this store decided, on {facts['cluster']}; {note.name} keeps it"
                kept, by = kept | values, by | dict.fromkeys(values, words)
        return resolve(config, model_config, space, nodes, kept, by)

    resolved = decided()
    if notes:
        missing = [(part, note) for part, note in known.items() if not note.finished]
        wrote = [do_once(note, partial(_write, values=_of_part(resolved.noted, part), nodes=nodes)) for part, note in missing]
        resolved = resolved if all(wrote) else decided()  # another run was first
    return Settled(resolved.config, resolved.lines, resolved.warnings)


def _write(note: Artifact, values: Mapping[str, Any], nodes: Sequence[Node]) -> None:
    note.finish({"values": dict(values), "cluster": in_words(nodes)})


def for_this_machine(config: RunConfig, store: Store) -> RunConfig:
    """With what this machine decides of the config (`hardware: auto`): this process computes on its CPU."""
    store.check()
    found = settle(config, config_of_parent(config), [this_machine(gpus=False)], store)
    print("\n".join(f"  {line}" for line in found.told()), file=sys.stderr, flush=True)
    return found.config

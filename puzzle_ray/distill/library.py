"""The block library: which files it is made of, what a group of layers trains, and the whole stage in one process."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, SearchSpace, SubblockKind, rows_from_parquet, rows_to_parquet
from puzzle_ray.blocks import load_stack
from puzzle_ray.checkpoint import locate, read_config
from puzzle_ray.config import LibraryConfig
from puzzle_ray.data import Tokens
from puzzle_ray.distill.bld import LayerTrainer, LibraryRow, Schedule, row_metadata
from puzzle_ray.families import describe
from puzzle_ray.progress import Progress
from puzzle_ray.store import Step

TABLE = "library.parquet"


def file_name(layer: int, kind: str, variant: str) -> str:
    return f"layer_{layer:03d}.{kind}.{re.sub('[^A-Za-z0-9_.]+', '-', variant)}.safetensors"


def checkpoint_name(layer: int) -> str:
    return f"checkpoints/layer_{layer:03d}.safetensors"


def unfinished_layers(space: SearchSpace, step: Step) -> list[int]:
    """Layers with a variant whose file is not there yet."""
    there = set(step.names())
    return sorted({layer for layer, kind, variant in space.subblocks() if file_name(layer, kind, variant) not in there})


class GroupTrainer:
    """The trainers of some layers, their checkpoints, and the publishing of what is finished. Runs anywhere."""

    def __init__(
        self, parent: str, layers: Sequence[int], space: SearchSpace, config: LibraryConfig, step: Step, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        folder = locate(parent)
        model_config = read_config(folder)
        descriptor = describe(model_config)
        self.step_files, self.config = step, config
        self.positions = Schedule.of(config).positions
        left = unfinished_layers(space, step)  # a process that is started again may have finished some
        self.trainers = []
        for index in (index for index in layers if index in left):
            stack = load_stack(folder, descriptor, model_config, index, index + 1, torch.float32, ends=False)
            trainer = LayerTrainer(index, stack, space.layers[index], config)
            if step.exists(checkpoint_name(index)):
                trainer.restore(*step.read_tensors(checkpoint_name(index)))
            self.trainers.append(trainer)

    @property
    def last(self) -> int:
        """The last position that every layer here has done, and that a restart would still know."""
        return min((trainer.position for trainer in self.trainers), default=self.positions - 1)

    def step(self, position: int, hidden_states: Mapping[int, Tensor]) -> float | None:
        """One position for every layer; `hidden_states[i]` is layer i's input, `[i + 1]` its output. Returns the mean loss."""
        losses = []
        for trainer in self.trainers:
            loss = trainer.step(position, hidden_states[trainer.index], hidden_states[trainer.index + 1])
            if loss is not None:
                losses.append(loss)
            if trainer.finished:
                self._publish(trainer)
            elif (position + 1) % self.config.checkpoint_every == 0:
                self._save(trainer)
        return sum(losses) / len(losses) if losses else None

    def _save(self, trainer: LayerTrainer) -> None:
        saved = trainer.checkpoint()
        if saved is not None:
            self.step_files.write_tensors(checkpoint_name(trainer.index), *saved)

    def _publish(self, trainer: LayerTrainer) -> None:
        for row, state, curve in trainer.results():
            name = file_name(row.layer, row.kind, row.variant)
            if not self.step_files.exists(name):
                self.step_files.write_tensors(name, state, row_metadata(row, curve))
        self.step_files.remove(checkpoint_name(trainer.index))


@dataclass(frozen=True)
class Library:
    """A finished block library in the store."""

    step: Step

    def rows(self) -> tuple[LibraryRow, ...]:
        rows, _ = rows_from_parquet(self.step.read(TABLE), LibraryRow)
        return rows

    def curves(self) -> dict[tuple[int, str, str], list[float]]:
        """(layer, kind, variant) -> normalised MSE at every training micro-batch."""
        raw = self.step.read_json("curves.json")
        return {(x["layer"], x["kind"], x["variant"]): x["losses"] for x in raw}

    def states(self, layer: int, choice: LayerChoice) -> dict[SubblockKind, dict[str, Tensor]]:
        """The weights of a choice's replaced subblocks."""
        replaced = [kind for kind in KINDS if choice.variant(kind) != PARENT]
        return {kind: self.step.read_tensors(file_name(layer, kind, choice.variant(kind)))[0] for kind in replaced}


def finish(space: SearchSpace, step: Step) -> Library:
    """Gathers every published variant's row and curve into tables, and closes the step."""
    rows, curves = [], []
    for layer, kind, variant in space.subblocks():
        header = _metadata(step, file_name(layer, kind, variant))
        rows.append(LibraryRow(**json.loads(header["row"])))
        curves.append({"layer": layer, "kind": kind, "variant": variant, "losses": json.loads(header["curve"])})
    step.write(TABLE, rows_to_parquet(rows, LibraryRow, {}))
    step.write_json("curves.json", curves)
    trained = [row for row in rows if row.kept == "trained"]
    step.finish(
        {
            "variants": len(rows),
            "trained": len(trained),
            "failures": [asdict(row) for row in rows if row.failure],
        }
    )
    return Library(step)


def _metadata(step: Step, name: str) -> dict[str, str]:
    """The header of a safetensors file, without its tensors."""
    with step.store.filesystem.open(step.path(name), "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    return dict(header.get("__metadata__", {}))


def build_serially(
    parent: str,
    space: SearchSpace,
    config: LibraryConfig,
    tokens: Tokens,
    seed: int,
    step: Step,
    progress: Progress,
    num_threads: int = 1,
) -> Library:
    """The library stage in this process, without Ray: the same numbers as on a cluster with the same threads per trainer."""
    layers = unfinished_layers(space, step)
    if layers:
        group = GroupTrainer(parent, layers, space, config, step, num_threads)
        folder = locate(parent)
        model_config = read_config(folder)
        depth = max(layers) + 1
        stack = load_stack(folder, describe(model_config), model_config, 0, depth, torch.float32)
        schedule = Schedule.of(config)
        sequences = config.micro_batch_tokens // tokens.sequences.shape[1]

        def travelled(hidden_states: Tensor) -> Tensor:
            """What arrives of a hidden state that went through the object store."""
            return hidden_states.to(getattr(torch, config.activation_dtype)).float()

        with progress.stage("library", schedule.positions, "micro-batch") as bar:
            bar.advance(group.last + 1)
            for position in range(group.last + 1, schedule.positions):
                ids = tokens.batch(seed, schedule.data_number(position), sequences)
                with torch.no_grad():
                    hidden = {0: travelled(stack.embed(ids))}
                    for index in range(depth):
                        hidden[index + 1] = travelled(stack.run_layer(stack.layer(index), index, hidden[index]))
                loss = group.step(position, hidden)
                bar.advance(1, **({} if loss is None else {"loss": loss}))
    return finish(space, step)

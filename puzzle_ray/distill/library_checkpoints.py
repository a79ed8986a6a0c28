"""When and how the trainers of a block library are saved.

A variant has two files. What it started from never changes, and is written once. The other one has the rest, and is written after
every `library.checkpoint_every` micro-batches, or without that setting every `library.checkpoint_minutes`: then from copies, in the
background, while training goes on. In the middle of an optimizer step it waits for the step's end, so that no gradients are written.

Every variant has files of its own, so that a run may go on with other trainers than it began with.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from puzzle_ray.distill.bld import LayerTrainer
from puzzle_ray.distill.candidate import Candidate
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.store import Artifact

Saved = tuple[str, Mapping[str, Tensor], Mapping[str, str]]  # name of the file, tensors, metadata


def variant_file(layer: int, kind: str, variant: str) -> str:
    """The file of one entry of a library. Where `kind` is `block`, `variant` is the label of a coupled pair."""
    words = re.sub("[^A-Za-z0-9_.+]+", "-", variant.replace(" + ", "+"))
    return f"layer_{layer:03d}.{kind}.{words}.safetensors"


def checkpoint_file(layer: int, kind: str, variant: str) -> str:
    return f"checkpoints/{variant_file(layer, kind, variant)}"


def start_file(layer: int, kind: str, variant: str) -> str:
    return f"checkpoints/start_of_{variant_file(layer, kind, variant)}"


class LibraryCheckpoints:
    """The checkpoints of the trainers of one process. `clock` gives seconds."""

    def __init__(self, artifact: Artifact, config: LibraryConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.artifact, self.config, self.clock = artifact, config, clock
        self._pool = ThreadPoolExecutor(1, "library-checkpoints")
        self._writing: Future[None] | None = None
        self._saved_at, self._counted = clock(), False

    def restore(self, trainer: LayerTrainer) -> None:
        """Continues with every variant that has a whole checkpoint."""
        for choice in trainer.choices:
            entry = (trainer.index, *trainer.space.entry(choice))
            files = [checkpoint_file(*entry), start_file(*entry)]
            if all(self.artifact.exists(name) for name in files):
                (tensors, metadata), (start, _) = (self.artifact.read_tensors(name) for name in files)
                trainer.restore(choice, tensors | start, metadata)

    def after(self, position: int, trainers: Collection[LayerTrainer]) -> None:
        """Saves those that are not finished, where it is time to. Raises what an earlier save in the background raised."""
        if self._writing is not None and self._writing.done():
            self.settle()
        every, now = self.config.checkpoint_every, self.clock()
        self._counted = self._counted or (every is not None and (position + 1) % every == 0)
        if any(trainer.in_step(position) for trainer in trainers):
            return
        if every is not None:
            if self._counted:
                self._counted = False
                self._write(list(self._due(trainers)))
        elif self._writing is None and now - self._saved_at >= 60 * self.config.checkpoint_minutes:
            self._saved_at = now
            copies = [(name, {n: _copy(t) for n, t in tensors.items()}, about) for name, tensors, about in self._due(trainers)]
            self._writing = self._pool.submit(self._write, copies)

    def save(self, trainers: Iterable[LayerTrainer]) -> None:
        """Saves those that are not finished, now, wherever they are in an optimizer step: their process is about to be ended."""
        self.settle()
        self._write(list(self._due(trainers)))

    def settle(self) -> None:
        """Waits for what is written in the background."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def forget(self, layer: int, kind: str, variant: str) -> None:
        """Removes the files of a variant that is published."""
        self.settle()
        for name in (checkpoint_file(layer, kind, variant), start_file(layer, kind, variant)):
            self.artifact.remove(name)

    def _due(self, trainers: Iterable[LayerTrainer]) -> Iterable[Saved]:
        """None of those that are still calibrating: that starts over.

        A start's file has the variant's name as metadata: safetensors cannot read a file that has nothing, as a no-op's would.
        """
        of_variants: list[tuple[tuple[int, str, str], Candidate]] = [
            ((trainer.index, *trainer.space.entry(candidate.choice)), candidate)
            for trainer in trainers
            if not trainer.finished
            for candidate in trainer.candidates
        ]
        for entry, candidate in of_variants:
            if not self.artifact.exists(start_file(*entry)):
                yield start_file(*entry), candidate.start_tensors(), {"variant": entry[2]}
            yield checkpoint_file(*entry), *candidate.checkpoint()

    def _write(self, files: Iterable[Saved]) -> None:
        for name, tensors, metadata in files:
            self.artifact.write_tensors(name, tensors, metadata)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.preserve_format)

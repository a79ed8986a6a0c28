"""When and how the trainers of a block library are saved.

A layer has two files. What its variants started from never changes, and is written once. The other one has the rest, and is written
after every `library.checkpoint_every` micro-batches, or without that setting every `library.checkpoint_minutes`: then from copies, in
the background, while training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from puzzle_ray.distill.bld import LayerTrainer
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.store import Artifact

Saved = tuple[str, Mapping[str, Tensor], Mapping[str, str]]  # name of the file, tensors, metadata


def checkpoint_file(layer: int) -> str:
    return f"checkpoints/layer_{layer:03d}.safetensors"


def start_file(layer: int) -> str:
    return f"checkpoints/start_{layer:03d}.safetensors"


class LibraryCheckpoints:
    """The checkpoints of the trainers of one process. `clock` gives seconds."""

    def __init__(self, artifact: Artifact, config: LibraryConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.artifact, self.config, self.clock = artifact, config, clock
        self._pool = ThreadPoolExecutor(1, "library-checkpoints")
        self._writing: Future[None] | None = None
        self._saved_at = clock()

    def restore(self, trainer: LayerTrainer) -> None:
        """Continues from the layer's checkpoint, if there is a whole one."""
        files = [checkpoint_file(trainer.index), start_file(trainer.index)]
        if all(self.artifact.exists(name) for name in files):
            (tensors, metadata), (start, _) = (self.artifact.read_tensors(name) for name in files)
            trainer.restore(tensors | start, metadata)

    def after(self, position: int, trainers: Iterable[LayerTrainer]) -> None:
        """Saves those that are not finished, where it is time to. Raises what an earlier save in the background raised."""
        if self._writing is not None and self._writing.done():
            self.settle()
        every, now = self.config.checkpoint_every, self.clock()
        if every is not None:
            if (position + 1) % every == 0:
                self._write(list(self._due(trainers)))
        elif self._writing is None and now - self._saved_at >= 60 * self.config.checkpoint_minutes:
            self._saved_at = now
            copies = [(name, {n: _copy(t) for n, t in tensors.items()}, about) for name, tensors, about in self._due(trainers)]
            self._writing = self._pool.submit(self._write, copies)

    def save(self, trainers: Iterable[LayerTrainer]) -> None:
        """Saves those that are not finished, now: their process is about to be ended."""
        self.settle()
        self._write(list(self._due(trainers)))

    def settle(self) -> None:
        """Waits for what is written in the background."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def forget(self, layer: int) -> None:
        """Removes the files of a layer that is published."""
        self.settle()
        for name in (checkpoint_file(layer), start_file(layer)):
            self.artifact.remove(name)

    def _due(self, trainers: Iterable[LayerTrainer]) -> Iterable[Saved]:
        for trainer in trainers:
            saved = None if trainer.finished else trainer.checkpoint()
            if saved is not None:
                if not self.artifact.exists(start_file(trainer.index)):
                    yield start_file(trainer.index), trainer.start_tensors(), {}
                yield checkpoint_file(trainer.index), *saved

    def _write(self, files: Iterable[Saved]) -> None:
        for name, tensors, metadata in files:
            self.artifact.write_tensors(name, tensors, metadata)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.preserve_format)

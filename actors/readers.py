"""Models that answer an evaluation's requests on Ray: a pool of processes, each with one model at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.memory import whole_model
from actors.model_shards import OneAfterTheOther, Shards, Started, placed
from actors.placement import require
from actors.pool import Pool, Terms
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.evaluation.reader import Reader, save_answer, saved_answer
from puzzle_ray.evaluation.requests import Answer, Asked, file_name
from puzzle_ray.progress import Progress
from puzzle_ray.store import Artifact

STAGE = "quality"
SILENT_S = 24 * 3600.0  # of a reader beside shards: a shard that is silent is an error of its own


def _ask(started: Started, item: Asked) -> Any:
    return started.worker.answer.remote(item, started.shards)


class ReaderProcess:
    """Answers for whichever model it is asked about; the one it was asked about last is in memory."""

    def __init__(
        self, folders: Mapping[str, str], batch_tokens: int, num_threads: int, num_gpus: float = 0, trusted: bool = False
    ) -> None:
        from puzzle_ray.process import compute_with, devices_for

        compute_with(num_threads)
        self.folders, self.batch_tokens, self.devices = dict(folders), batch_tokens, devices_for(num_gpus)
        self.name, self.trusted = "", trusted
        self.reader: Reader | None = None

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def answer(self, asked: Asked, shards: Shards | OneAfterTheOther | None = None) -> Answer:
        """With `shards`, the model's layers lie there."""
        name, chunk = asked
        if name != self.name or self.reader is None:
            self.reader = None  # its memory goes before the next one comes
            layers_of = shards.layers_of if shards else None
            how = (self.batch_tokens, self.devices, self.trusted, layers_of)
            self.name, self.reader = name, Reader(self.folders[name], *how)
        return self.reader.answer(chunk)


@ray.remote(max_restarts=0)  # the pool starts another, and answering again gives the same
class ReaderActor(ReaderProcess):
    """A reader as an actor."""


class AskOnRay:
    """Hands chunks to a pool; what is answered is kept in the stage's folder, and not asked again by the next run. `close` ends it."""

    def __init__(
        self,
        folders: Mapping[str, str],
        batch_tokens: int,
        cluster: ClusterConfig,
        artifact: Artifact,
        progress: Progress,
        trusted: bool = False,
        num_shards: int = 0,
    ) -> None:
        self.folders, self.batch_tokens, self.cluster = folders, batch_tokens, cluster
        self.artifact, self.progress, self.trusted, self.num_shards = artifact, progress, trusted, num_shards
        self.pool: Pool[Started, Asked] | None = None
        self.room = 0

    def __call__(self, asked: Sequence[Asked]) -> list[Answer]:
        """In the order asked for. Raises ClusterError when processes cannot be placed or stop answering."""
        found = {file_name(item): saved_answer(self.artifact, item) for item in asked}
        todo = {file_name(item): item for item in asked if found[file_name(item)] is None}
        with self.progress.stage(STAGE, len(found), "chunk") as bar:
            bar.advance(len(found) - len(todo))

            def receive(item: Asked, answer: Answer) -> bool:
                found[file_name(item)] = answer
                save_answer(self.artifact, item, answer)
                bar.advance()
                return False

            if todo:
                pool = self._started(len(todo))
                pool.run(todo.values(), _ask, receive, name_of=file_name)
        answers = [found[file_name(item)] for item in asked]
        return [answer for answer in answers if answer is not None]

    def _started(self, limit: int) -> Pool[Started, Asked]:
        """As many processes as there is room for, up to `limit`; with shards, one that asks them."""
        if self.pool is None:
            self.pool = self._beside_shards() if self.num_shards else self._of_whole_models()
        self.pool.start(max(0, min(self.room, limit) - len(self.pool.workers)))
        return self.pool

    def _of_whole_models(self) -> Pool[Started, Asked]:
        options, gpus = whole_model(self.folders.values(), self.cluster, "a reader", STAGE)
        self.room = require(options, "a reader", STAGE, self.cluster.autoscaling) or 1

        def start_one() -> tuple[Started, list[ActorHandle[Any]]]:
            started = Started(self._reader(options, gpus))
            return started, started.actors

        terms = Terms(STAGE, "readers", self.cluster.placement_timeout_s, self.cluster.step_timeout_s)
        return Pool(start_one, terms)

    def _beside_shards(self) -> Pool[Started, Asked]:
        placement = placed(self.folders.values(), self.cluster, self.num_shards, STAGE, "float32")
        self.room = 1

        def start_one() -> tuple[Started, list[ActorHandle[Any]]]:
            started = placement.start(lambda options: self._reader(options, placement.num_gpus))
            return started, started.actors

        dead = "raise evaluate.num_shards, or use bigger nodes"
        terms = Terms(STAGE, "readers with their shards", self.cluster.placement_timeout_s, SILENT_S, when_dead=dead)
        return Pool(start_one, terms)

    def _reader(self, options: Mapping[str, Any], num_gpus: float) -> ActorHandle[Any]:
        start = ReaderActor.options(**options)  # type: ignore[attr-defined]
        reader: ActorHandle[Any] = start.remote(self.folders, self.batch_tokens, 1, num_gpus, self.trusted)
        return reader

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

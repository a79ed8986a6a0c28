"""The tokens stage on Ray: one process reads the text, a pool tokenises its blocks, and the driver sees numbers alone.

A block is a function of the text, and its shards are a function of the block and of how many tokens its splits may still have. How many
that is, is known for certain only when all blocks before it are done. So a block that took more than turns out to be left, which only the
last ones of a limited text can do, is done once more. Whoever dies loses the block it was at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.data_plane import MANY_CHARACTERS
from actors.names import actor_name
from actors.placement import DIED, require
from actors.pool import MAX_DEATHS, POLL_S, Pool, Terms
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.blocks import Block, ShardFacts, Text, do_block
from puzzle_ray.data.mixture import SourceRead
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.shards import ArtifactShards
from puzzle_ray.data.sources import likely_characters
from puzzle_ray.data.splits import train_hash
from puzzle_ray.data.tokenising import Streamed
from puzzle_ray.errors import ClusterError
from puzzle_ray.store import Artifact

STAGE = "tokens"
OPTIONS = {"num_cpus": 1}  # of a tokeniser
_REST_S = 0.1

Done = tuple[list[SourceRead], dict[str, ShardFacts]]


@dataclass(frozen=True)
class ParentTokenizer:
    """Where every process finds the parent's tokenizer."""

    parent: str
    trust_remote_code: bool = False

    def read(self) -> Any:
        from puzzle_ray.models.tokenizer import tokenizer_of

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process has one core; other processes have the others
        return tokenizer_of(self.parent, self.trust_remote_code)


class TextReader:
    """Reads the text once, from its beginning on, and hands out blocks in their order. Any other order makes it begin anew."""

    def __init__(self, tokenizer: ParentTokenizer) -> None:
        self.tokenizer = tokenizer.read()
        self.text: Text | None = None
        self.blocks: Iterator[Block] = iter(())
        self.next = 0
        self.began, self.steps = time.time_ns(), 0

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def has_few_documents(self, text: Text) -> bool:
        return text.has_few_documents(self.tokenizer, self._step)

    def block(self, text: Text, number: int) -> Block | None:
        """None behind the last one."""
        if text != self.text or number < self.next:
            self.text, self.blocks, self.next = text, text.blocks(self.tokenizer, self._step), 0
        found = None
        while self.next <= number:
            found = next(self.blocks, None)
            self.next += 1
        return found

    def train_hash(self, artifact: Artifact) -> str:
        return train_hash(artifact, self._step)

    def progress(self) -> tuple[int, int]:
        """When this process began, and how many pieces of text or parts of the tokens it has read since."""
        return self.began, self.steps

    def _step(self) -> None:
        self.steps += 1


# it holds nothing but its place in the text
@ray.remote(max_restarts=-1, max_task_retries=-1, concurrency_groups={"status": 1})
class TextReaderActor(TextReader):
    """A reader as an actor."""


class BlockTokeniser:
    """Writes the shards of blocks."""

    def __init__(self, tokenizer: ParentTokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer.read(), vocab_size

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def tokenise(self, artifact: Artifact, block: Block | None, room: dict[str, int]) -> Done | None:
        """None where there is no such block."""
        if block is None:
            return None
        shards = ArtifactShards(artifact, self.tokenizer, self.vocab_size)
        return list(block.read), do_block(shards, block, room, self.tokenizer)

    def rest(self) -> None:
        """While all blocks that may be begun are with others."""
        time.sleep(_REST_S)


@ray.remote(max_restarts=0)  # the pool starts another, and doing a block again writes the same shards
class BlockTokeniserActor(BlockTokeniser):
    """A tokeniser as an actor."""


class _Followed:
    """Sees the reader get on while others wait for it, and waits for no answer itself.

    A reader that dies again and again is begun anew each time; from the third on that is no longer getting on.
    """

    def __init__(self, reader: ActorHandle[Any]) -> None:
        self.reader = reader
        self.asked: ObjectRef[tuple[int, int]] | None = None
        self.last: tuple[int, int] | None = None
        self.began: set[int] = set()
        self.seen = 0

    def look(self) -> int:
        """How often it was seen to have got on."""
        if self.asked is None:
            self.asked = self.reader.progress.options(concurrency_group="status").remote()
        if not ray.wait([self.asked], timeout=0)[0]:
            return self.seen
        answer, self.asked = self.asked, None
        try:
            now = ray.get(answer, timeout=POLL_S)
        except DIED:  # what it was asked for tells what became of it
            return self.seen
        self.began.add(now[0])
        self.seen += now != self.last and len(self.began) < MAX_DEATHS
        self.last = now
        return self.seen


@dataclass
class _Lane:
    """What one worker at a time is at: a block, or nothing."""

    number: int | None = None
    seen: int = 0  # of the reader's steps


@dataclass
class _Flow:
    """One text on its way through the workers. Blocks are begun in order, and counted in order."""

    text: Text
    artifact: Artifact
    reader: ActorHandle[Any]
    most_open: int  # blocks that are begun and not counted
    told: Callable[[int], object]
    done: Streamed = field(init=False)
    texts: dict[int, ObjectRef[Block | None]] = field(default_factory=dict)
    found: dict[int, Done] = field(default_factory=dict)  # not counted yet: one before them is not done
    again: list[int] = field(default_factory=list)
    next: int = 0
    num_blocks: int | None = None  # once it is known

    def __post_init__(self) -> None:
        self.done = Streamed(self.text, self.told)

    def send(self, worker: ActorHandle[Any], lane: _Lane) -> ObjectRef[Done | None]:
        if lane.number is None:
            lane.number = self._take()
        if lane.number is None:
            return worker.rest.remote()
        return worker.tokenise.remote(self.artifact, self._text_of(lane.number), self.done.room)

    def receive(self, lane: _Lane, result: Done | None) -> bool:
        """Whether the lane has something to do, or may have soon."""
        number, lane.number = lane.number, None
        if number is not None and result is None:
            self.num_blocks = number if self.num_blocks is None else min(self.num_blocks, number)
        elif number is not None and result is not None:
            self.found[number] = result
        self._count()
        if self.done.full:
            self.again.clear()
            return False
        return bool(self.again) or self.num_blocks is None or self.next < self.num_blocks

    def news(self, followed: _Followed, lane: _Lane) -> bool:
        """Whether a lane that waits for its text may go on waiting, as the reader gets on."""
        text = None if lane.number is None else self.texts.get(lane.number)
        if text is None or ray.wait([text], timeout=0, fetch_local=False)[0]:
            return False
        before, lane.seen = lane.seen, followed.look()
        return lane.seen != before

    def _take(self) -> int | None:
        if self.again:
            return self.again.pop()
        ended = self.done.full or (self.num_blocks is not None and self.next >= self.num_blocks)
        if ended or self.next >= self.done.num_blocks + self.most_open:
            return None
        self.next += 1
        self._text_of(self.next)  # is read while this one is tokenised
        return self.next - 1

    def _text_of(self, number: int) -> ObjectRef[Block | None]:
        for asked in range(max(self.texts, default=self.done.num_blocks - 1) + 1, number + 1):  # in order: it reads forwards
            self.texts[asked] = self.reader.block.remote(self.text, asked)
        return self.texts[number]

    def _count(self) -> None:
        """Counts what is done, as far as there is no gap. What took too much is done once more, with the room that there is."""
        while not self.done.full and (number := self.done.num_blocks) in self.found:
            read, facts = self.found.pop(number)
            if not self.done.add(read, facts):
                self.again.append(number)
                return
            self.texts.pop(number, None)


class OnRay:
    """A `Tokeniser` whose work is done by a reader and a pool, until it is closed.

    `told` hears of the characters of every block that is done. Raises ClusterError when they cannot be placed or do not answer.
    """

    def __init__(
        self,
        tokenizer: ParentTokenizer,
        artifact: Artifact,
        vocab_size: int,
        cluster: ClusterConfig,
        num_workers: int,
        told: Callable[[int], object] = lambda characters: None,
    ) -> None:
        self.artifact, self.cluster, self.num_workers, self.told = artifact, cluster, num_workers, told
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # where the paths are meant
        read_here = TextReaderActor.options(num_cpus=0, scheduling_strategy=here, **actor_name("text reader"))  # type: ignore[attr-defined]
        self.reader: ActorHandle[Any] = read_here.remote(tokenizer)
        self.followed = _Followed(self.reader)

        def start_one() -> tuple[ActorHandle[Any], list[ActorHandle[Any]]]:
            named = BlockTokeniserActor.options(**OPTIONS, **actor_name("tokeniser"))  # type: ignore[attr-defined]
            worker = named.remote(tokenizer, vocab_size)
            return worker, [worker]

        terms = Terms(STAGE, "tokenisers", cluster.placement_timeout_s, cluster.step_timeout_s)
        self.pool: Pool[ActorHandle[Any], _Lane] = Pool(start_one, terms)

    def has_few_documents(self, text: Text) -> bool:
        return bool(self._asked(self.reader.has_few_documents.remote(text), "the first documents were not read"))

    def stream(self, text: Text) -> Streamed:
        flow = _Flow(text, self.artifact, self.reader, 2 * self.num_workers, self.told)
        self.pool.start(self.num_workers - len(self.pool.workers))
        lanes = [_Lane() for _ in range(self.num_workers)]
        self.pool.run(
            lanes,
            flow.send,
            flow.receive,
            name_of=lambda lane: f"block {lane.number}",
            news=lambda worker, lane: flow.news(self.followed, lane),
        )
        return flow.done

    def train_hash(self, artifact: Artifact) -> str:
        """Read by the reader, which has nothing else to do by then."""
        return str(self._asked(self.reader.train_hash.remote(artifact), "the tokens were not read"))

    def _asked(self, ref: ObjectRef[Any], problem: str) -> Any:
        """The reader's answer, however long it takes, as long as the reader gets on."""
        heard, seen = time.monotonic(), self.followed.seen
        while not ray.wait([ref], timeout=POLL_S)[0]:
            before, seen = seen, self.followed.look()
            now = time.monotonic()
            if seen != before:
                heard = now
            if now - heard > self.cluster.step_timeout_s:
                words = f"{problem}: nothing was read for {self.cluster.step_timeout_s:g} s"
                raise ClusterError(STAGE, words, "raise cluster.step_timeout_s")
        return ray.get(ref, timeout=self.cluster.step_timeout_s)

    def close(self) -> None:
        self.pool.close()
        ray.kill(self.reader)


def num_tokenisers(config: DataConfig, cluster: ClusterConfig) -> int:
    """How many workers are to tokenise; 0 where this process does it. Raises ClusterError where none that is asked for has room."""
    asked = config.tokenise_workers
    if asked == 0 or (asked == "auto" and likely_characters(config) < MANY_CHARACTERS):
        return 0
    room = require(OPTIONS, "a tokeniser", STAGE, cluster.autoscaling)
    wanted = max(1, room) if asked == "auto" else asked
    return wanted if cluster.autoscaling else min(wanted, max(1, room))

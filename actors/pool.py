"""The one pool: hands out work to actors as they are free, starts another where one dies, and always ends them."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from actors.metrics import note
from actors.placement import CLAIMS, DIED, end, not_placed, not_started
from puzzle_ray.errors import ClusterError

MAX_DEATHS = 3  # of workers at one item without a success between them
MAX_FAILED_STARTS = 3  # one after the other
POLL_S = 1.0

Handle = TypeVar("Handle")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Terms:
    """What a pool is for, in the words of its errors, and how long it waits."""

    stage: str
    workers: str  # such as "profilers"
    placement_timeout_s: float
    step_timeout_s: float  # without any news from a worker that has work
    when_late: str = "raise cluster.step_timeout_s"
    when_dead: str = "if it lacked memory, use bigger nodes"


@dataclass
class Worker(Generic[Handle]):
    """Whom items are sent to: an actor, or several that work as one."""

    handle: Handle
    actors: Sequence[ActorHandle[Any]]
    num_starting: int
    num_items: int = 0
    heard: float = field(default_factory=time.monotonic)  # when it last answered


@dataclass
class Work(Generic[Item]):
    """An item, and how many workers died at it since it was last sent successfully."""

    item: Item
    deaths: int = 0


class Pool(Generic[Handle, Item]):
    """Workers that take items as soon as they are started.

    `start` asks Ray for one worker: its handle and its actors, which have a method `node`. A worker has up to `depth` items at a time.
    With `restarts`, Ray itself starts dead processes anew and repeats their calls. Without, the pool does: the item goes to whoever is
    free, and another worker is started. A worker that dies without work counts against no item.

    `check` is called once a second while no worker is there: it raises where none can ever be. `claims` are the resources that each
    worker holds of its node, for stages that run beside this one.
    """

    def __init__(
        self,
        start: Callable[[], tuple[Handle, Sequence[ActorHandle[Any]]]],
        terms: Terms,
        *,
        depth: int = 1,
        restarts: bool = False,
        check: Callable[[], object] = lambda: None,
        claims: Mapping[str, float] | None = None,
    ) -> None:
        self.start_one, self.terms, self.depth, self.restarts, self.check = start, terms, depth, restarts, check
        self.claims = claims or {}
        self.starting: dict[ObjectRef[str], Worker[Handle]] = {}
        self.ready: list[Worker[Handle]] = []
        self.asked: dict[
            ObjectRef[str], tuple[Worker[Handle], Work[Item]]
        ] = {}  # whether they still live, before they get an item
        self.running: dict[ObjectRef[Any], tuple[Worker[Handle], Work[Item]]] = {}
        self.waiting: deque[Work[Item]] = deque()
        self.failed_starts = 0
        self.alone_since = self.looked = time.monotonic()

    def __enter__(self) -> Pool[Handle, Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def workers(self) -> list[Worker[Handle]]:
        """All that were started and are not known to be dead."""
        return [*self.ready, *{id(worker): worker for worker in self.starting.values()}.values()]

    def start(self, count: int) -> None:
        """Asks Ray for `count` more workers, and does not wait for them."""
        self.alone_since = time.monotonic()
        for _ in range(count):
            handle, actors = self.start_one()
            worker = Worker(handle, actors, len(actors))
            self.starting.update({actor.node.remote(): worker for actor in actors})

    def run(
        self,
        items: Iterable[Item],
        send: Callable[[Handle, Item], ObjectRef[Any]],
        receive: Callable[[Item, Any], bool],
        *,
        name_of: Callable[[Item], str],
        news: Callable[[Handle, Item], bool] | None = None,
        each_round: Callable[[], None] = lambda: None,
    ) -> None:
        """Until all items are done. `receive` gets what `send` had computed, and says whether the item is to be sent once more.

        `news` is asked once a second whether a worker got on with an item. `each_round` is called whenever something has changed, and
        at least once a second. Raises ClusterError when no worker is there within `placement_timeout_s`, when one has no news for
        `step_timeout_s`, or when workers keep dying; and whatever the work itself raised.
        """
        self.waiting.extend(Work(item) for item in items)
        self.alone_since = time.monotonic()
        while self.waiting or self.running or self.asked:
            self._hand_out(send)
            done, _ = ray.wait([*self.running, *self.asked, *self.starting], num_returns=1, timeout=POLL_S)
            for ref in done:
                if ref in self.starting:
                    self._started(ref)
                elif ref in self.asked:
                    self._answered(ref, send)
                else:
                    self._ended(ref, send, receive, name_of)
            each_round()
            note("queue_depth", len(self.waiting), stage=self.terms.stage)
            if time.monotonic() - self.looked >= POLL_S or not done:
                self.looked = time.monotonic()
                self._look(name_of, news)

    def close(self) -> None:
        """Ends all workers."""
        workers = self.workers
        for worker in workers:
            self._unclaim(worker)
        end([actor for worker in workers for actor in worker.actors])
        self.starting, self.ready, self.asked, self.running = {}, [], {}, {}
        self.waiting.clear()

    def _hand_out(self, send: Callable[[Handle, Item], ObjectRef[Any]]) -> None:
        """Gives waiting items to those that have the fewest."""
        while self.waiting and self.ready:
            worker = min(self.ready, key=lambda worker: worker.num_items)
            if worker.num_items >= self.depth:
                return
            if not worker.num_items:
                worker.heard = time.monotonic()
            worker.num_items += 1
            work = self.waiting.popleft()
            if self.restarts:
                self.running[send(worker.handle, work.item)] = (worker, work)
            else:
                self.asked[worker.actors[0].node.remote()] = (worker, work)

    def _started(self, ref: ObjectRef[str]) -> None:
        worker = self.starting.pop(ref)
        try:
            node = ray.get(ref, timeout=self.terms.step_timeout_s)
        except DIED as error:
            self._failed_to_start(worker, error)
            return
        worker.num_starting -= 1
        if self.claims:
            CLAIMS.add(id(worker), node, self.claims)
        if not worker.num_starting:
            self.failed_starts = 0
            worker.heard = time.monotonic()
            self.ready.append(worker)

    def _failed_to_start(self, worker: Worker[Handle], error: RayError) -> None:
        """Tries again, unless it would be in vain; goes on with those that are there, if any are."""
        self.failed_starts += 1
        self._bury(worker)
        own = isinstance(error, RayActorError) and error.actor_init_failed  # its constructor raised: it would do so again
        if not own and self.failed_starts < MAX_FAILED_STARTS:
            self.start(1)
            return
        failure = not_started(self.terms.workers, error)
        if not self.workers:
            raise failure from None
        print(f"  {failure}; the {len(self.workers)} others go on", file=sys.stderr, flush=True)

    def _answered(self, ref: ObjectRef[str], send: Callable[[Handle, Item], ObjectRef[Any]]) -> None:
        """It lives and gets its item, or it died at rest: then the item goes to another."""
        worker, work = self.asked.pop(ref)
        try:
            ray.get(ref, timeout=self.terms.step_timeout_s)
        except DIED:
            self.waiting.appendleft(work)
            self._replace(worker)
            return
        worker.heard = time.monotonic()
        self.running[send(worker.handle, work.item)] = (worker, work)

    def _ended(
        self,
        ref: ObjectRef[Any],
        send: Callable[[Handle, Item], ObjectRef[Any]],
        receive: Callable[[Item, Any], bool],
        name_of: Callable[[Item], str],
    ) -> None:
        worker, work = self.running.pop(ref)
        try:
            result = ray.get(ref, timeout=self.terms.step_timeout_s)
        except DIED as error:
            work.deaths += 1
            if work.deaths == MAX_DEATHS:
                reason = str(error).strip().splitlines()[0]
                problem = f"{name_of(work.item)}: the process that did it died again and again ({reason})"
                raise ClusterError(self.terms.stage, problem, self.terms.when_dead) from None
            self.waiting.appendleft(work)
            self._replace(worker)
            return
        worker.heard, work.deaths = time.monotonic(), 0
        if receive(work.item, result):
            self.running[send(worker.handle, work.item)] = (worker, work)
        else:
            worker.num_items -= 1

    def _replace(self, worker: Worker[Handle]) -> None:
        """Another one for a worker that died. It is placed where there is room."""
        if worker in self.ready:  # else its death is known from another of its items
            self._bury(worker)
            self.start(1)

    def _bury(self, worker: Worker[Handle]) -> None:
        """Forgets a worker, and ends what may be left of it."""
        self.ready = [other for other in self.ready if other is not worker]
        self.starting = {ref: other for ref, other in self.starting.items() if other is not worker}
        self._unclaim(worker)
        for actor in worker.actors:
            ray.kill(actor, no_restart=True)

    def _unclaim(self, worker: Worker[Handle]) -> None:
        CLAIMS.remove(id(worker))

    def _look(self, name_of: Callable[[Item], str], news: Callable[[Handle, Item], bool] | None) -> None:
        """Once a second: whether there are workers, and whether they get on."""
        now = time.monotonic()
        if self.ready:
            self.alone_since = now
        elif self.waiting or self.running or self.asked:
            self.check()
            if now - self.alone_since > self.terms.placement_timeout_s:
                raise not_placed(f"{len(self.workers)} {self.terms.workers}", self.terms.placement_timeout_s)
        for worker, work in [*self.running.values(), *self.asked.values()]:
            if news and news(worker.handle, work.item):
                worker.heard = time.monotonic()
            if time.monotonic() - worker.heard > self.terms.step_timeout_s:
                problem = f"{name_of(work.item)}: nothing was done within {self.terms.step_timeout_s:g} s"
                raise ClusterError(self.terms.stage, problem, self.terms.when_late)

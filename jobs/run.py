"""A run as a graph of stages: what each stage reads, where its result is kept, and doing what is not finished yet.

A stage is one file in `jobs/stages` that declares `STAGE`. The graph can be asked without doing anything (`Run.artifact`,
`puzzle-ray status`) and done (`Run.done`).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jobs.endings import wake_main_thread
from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.plugins import declared
from puzzle_ray.process import num_cores
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Display, Progress
from puzzle_ray.store import Artifact, Store, do_once

if TYPE_CHECKING:
    from puzzle_ray.profiling.engine import Target


OF_ORIGINAL = ("tiny_parent", "tokens", "profile", "sweep")  # stages that all rounds share: none of them reads a round's child


class NotDone(Exception):
    """What was asked for depends on the result of `stage`, which is not finished."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `inputs` are the stages it reads: their keys are part of its own. `reads` are stages that come first and whose content
    decides its key, by what `sources` makes of it. `settings` are what of the config its result depends on; `sources` name
    everything else that it reads, with something that changes when that does. `work` fills the artifact and finishes it.
    `wanted` says for which configs there is such a stage. `said` is what to say of a finished one, in one line; nothing where it is
    empty. `beside` says whether it may run while others do; its work then sets `run.placed` once it has what it needs of the cluster.
    `foreseen` looks, as soon as a stage of `reads` is finished, for what the work would be refused for, before others come in between.
    """

    name: str
    work: Callable[[Run, Artifact], None]
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    settings: Callable[[Run], Mapping[str, Any]] = lambda run: {}
    sources: Callable[[Run], Mapping[str, str]] = lambda run: {}
    wanted: Callable[[RunConfig], bool] = lambda config: True
    said: Callable[[Mapping[str, Any]], str] | None = None
    beside: Callable[[Run], bool] = lambda run: False
    foreseen: Callable[[Run], None] | None = None


class Listener(Protocol):
    """Who is told what a run does: its log, and what draws it."""

    def begun(self, artifact: Artifact) -> None:
        """A stage is looked at: it may be finished already."""

    def ended(self, artifact: Artifact, did: bool, seconds: float) -> None:
        """Its artifact is finished; `did` where this run did the work."""

    def done(self, name: str) -> None:
        """A stage of the run itself is finished, and what it made can be read."""

    def follow(self, run: Run) -> None:
        """From now on, it is this round's stages that are told of."""


@lru_cache(maxsize=1)
def stages() -> dict[str, Stage]:
    """Every stage by its name."""
    found: list[Stage] = declared("jobs.stages", "STAGE")
    return {stage.name: stage for stage in found}


def in_order(names: Iterable[str], config: RunConfig) -> list[Stage]:
    """These stages and all they need, each behind what it needs; what a stage reads is before its inputs.

    So a run has its profile before its library, which is trained beside it or after a look at what it says of the budget.
    """
    found: dict[str, Stage] = {}

    def visit(name: str) -> None:
        stage = stages()[name]
        if name in found or not stage.wanted(config):
            return
        for needed in (*stage.reads, *stage.inputs):
            visit(needed)
        found[name] = stage

    for name in names:
        visit(name)
    return list(found.values())


@dataclass(frozen=True)
class Parent:
    """`address`: as every node can find it, a folder, a URL, or a hub id with its commit. `folder`: on this machine."""

    address: str
    folder: Path
    key: str
    model_config: Any

    @classmethod
    def at(cls, address: str) -> Parent:
        from puzzle_ray.models.checkpoint import fingerprint, locate
        from puzzle_ray.models.child import read_config

        folder = locate(address)
        return cls(address, folder, fingerprint(folder), read_config(folder))

    @property
    def max_positions(self) -> int | None:
        """Tokens that it has positions for; None where any number will do."""
        return getattr(self.model_config, "max_position_embeddings", None)


def _is_folder(named: str) -> bool:
    """False for what cannot be looked into, too: whoever looks for the parent says why."""
    try:
        return Path(named).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long for a name, or no such user's home
        return False


class Run:
    """One config and its store; with `config.rounds`, one round of it.

    `after` is the round before, whose child, distilled, is the parent here. All rounds are the same stages. What depends on the original
    model alone (`OF_ORIGINAL`) is the first round's in all of them.
    """

    def __init__(self, config: RunConfig, progress: Progress | None = None, after: Run | None = None) -> None:
        self.config, self.after = config, after
        self.number: int = 1 if after is None else after.number + 1  # of the round
        self.original: Run = self if after is None else after.original
        self.progress = progress or Display()
        self.store = Store(config.store)
        self.seconds: dict[str, float] = {}  # that every stage took when it was done
        self.listener: Listener | None = None
        self.decided: tuple[str, ...] = ()  # what the hardware decided of the config, in words
        self._artifacts: dict[str, Artifact] = {}
        self._finished: set[str] = set()  # names of stages and keys of other artifacts
        self.placed = threading.Event()  # set by a stage that runs beside others, once it has what it needs of the cluster

    def check(self) -> None:
        """Raises a PuzzleError for what can be known to be wrong before work starts."""
        from jobs.checks import check

        check(self.config, self.store)

    # asking

    def artifact(self, name: str) -> Artifact:
        """Where a stage's result is kept, finished or not. Raises NotDone where that depends on an unfinished stage's content."""
        if self.after is not None and name in OF_ORIGINAL:
            return self.original.artifact(name)
        if name not in self._artifacts:
            stage = stages()[name]
            inputs = {other: self.artifact(other).key for other in stage.inputs if stages()[other].wanted(self.config)}
            self._artifacts[name] = self.store.artifact(name, stage.settings(self), inputs | dict(stage.sources(self)))
        return self._artifacts[name]

    def content(self, name: str) -> Artifact:
        """A finished stage's artifact. Raises NotDone."""
        artifact = self.artifact(name)
        if name not in self._finished and not artifact.finished:
            raise NotDone(name)
        return artifact

    @cached_property
    def parent(self) -> Parent:
        """Raises NotDone while the tiny parent is not trained, or the round before is not done."""
        from puzzle_ray.models.checkpoint import locate

        if self.after is not None:
            return Parent.at(self.after.content("gkd").path("child"))
        named = self.config.parent
        if named == TINY:
            return Parent.at(f"{self.content('tiny_parent').path('parent')}/model")
        if _is_folder(named):
            return Parent.at(str(Path(named).expanduser().absolute()))
        if "://" in named:
            return Parent.at(named)
        folder = locate(named, self.config.revision, self.config.trust_remote_code)
        commit = folder.name  # the hub's cache names a snapshot's folder by its commit
        return Parent.at(f"{named}@{commit}")

    @cached_property
    def next_round(self) -> Run:
        """The round after this one. It can be asked for before its parent is there."""
        assert self.number < self.config.rounds, "this is the last round"
        following = Run(self.config, self.progress, self)
        following.listener = self.listener
        return following

    def last_round(self) -> Run:
        """Does all rounds but the last up to their distilled child, and returns the last."""
        run = self
        while run.number < run.config.rounds:
            print(f"  round {run.number} of {run.config.rounds}", file=sys.stderr, flush=True)
            run.done("gkd")
            run = run.next_round
            if run.listener is not None:
                run.listener.follow(run)
        return run

    @cached_property
    def whole_space(self) -> SearchSpace:
        """Every variant that the config offers."""
        from puzzle_ray.export.target import configured_space

        space = self.config.space
        return configured_space(self.parent.model_config, space, self.config.search.target_format)

    @cached_property
    def space(self) -> SearchSpace:
        """What is trained, scored and searched: the whole space, or what `library.narrow_from` leaves of it."""
        from puzzle_ray.search.narrow import library_space

        return library_space(self.whole_space, self.config.library)

    @cached_property
    def profile_config(self) -> ProfileConfig:
        """How to profile, with numbers in place of `auto`."""
        if self.after is not None:
            return self.original.profile_config
        from puzzle_ray.profiling.batch_sizes import with_batch_sizes

        limit_mib = self.config.search.limits.memory_mib
        return with_batch_sizes(self.config.profile, self.parent.model_config, self.whole_space, limit_mib)

    @cached_property
    def target(self) -> Target:
        """What a profile of this run is of. Asked once: the node that will measure where there is a cluster, else this machine, which
        a cluster of our own would have to itself. Raises ClusterError where no node answers, ProfileError where it has no such device.
        """
        from puzzle_ray.profiling.engine import depends_on_node, target_here

        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized() or not depends_on_node(self.config.profile):
            return target_here(self.config.profile, num_cores())
        from actors.profiler import ask_target

        return ask_target(self.config.profile, self.config.cluster)

    def in_context(self, input_tokens: float, output_tokens: float) -> Run:
        """The same run with sequences of another length in its profile, at the same batch sizes."""
        profile = self.profile_config
        scenario = replace(profile.scenario, input_tokens=input_tokens, output_tokens=output_tokens)
        if scenario == profile.scenario:
            return self
        profile = profile.model_copy(update={"scenario": scenario})
        other = Run(self.config.model_copy(update={"profile": profile}), self.progress)
        other.listener = self.listener
        other.target = self.target
        return other

    # doing

    def done(self, *names: str) -> Artifact:
        """Does these stages and all they need, but for what is finished. Returns the last one's artifact.

        A stage that may run beside others does so in a thread; who reads it waits for it. Where it fails, so does the run at once.
        """
        background: dict[str, _Background] = {}
        order = in_order(names, self.config)
        with _ended_together(background):
            for stage in order:
                if stage.name in self._finished:
                    continue
                for needed in (*stage.inputs, *stage.reads):
                    if needed in background:
                        background[needed].join()
                if not self.artifact(stage.name).finished and stage.beside(self):
                    background[stage.name] = _Background(stage.name, partial(self._do, stage))
                    background[stage.name].start(self.placed)
                else:
                    self._do(stage)
                for later in order:
                    if later.foreseen is not None and stage.name in later.reads and later.name not in self._finished:
                        later.foreseen(self)
            for waiting in background.values():
                waiting.join()
        return self.artifact(names[-1])

    def _do(self, stage: Stage) -> None:
        run = self.original if stage.name in OF_ORIGINAL else self
        artifact = self.finish(self.artifact(stage.name), lambda artifact: stage.work(run, artifact))
        self._finished.add(stage.name)
        if self.listener is not None:
            self.listener.done(stage.name)
        words = stage.said(artifact.facts()) if stage.said is not None else ""
        if words:
            print(f"  {words}", file=sys.stderr, flush=True)

    def finish(self, artifact: Artifact, work: Callable[[Artifact], None]) -> Artifact:
        """Does `work` unless the artifact is finished, and says in one line where the result is."""
        if artifact.key in self._finished:
            return artifact
        started = time.monotonic()
        if self.listener is not None:
            self.listener.begun(artifact)
        did = do_once(artifact, work)
        seconds = time.monotonic() - started
        took = f"{seconds:.1f} s" if did else "already there"
        record = artifact.record()
        if record is not None and record.seconds is not None:
            self.seconds[artifact.stage] = record.seconds
        print(f"[{artifact.stage}] {took}: {artifact.url}", file=sys.stderr, flush=True)
        self._finished.add(artifact.key)
        if self.listener is not None:
            self.listener.ended(artifact, did, seconds)
        return artifact


class _Background:
    """A stage in a thread of its own. Where it fails while nobody waits for it, the main thread is interrupted."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._work, self._awaited = work, False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, placed: threading.Event) -> None:
        """Returns once the stage says that it has what it needs of the cluster, or is at its end."""
        self._thread.start()
        while self._thread.is_alive() and not placed.wait(0.1):
            pass

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again where it is waited for
            self.error = error
            if not self._awaited:
                wake_main_thread()

    def leave(self) -> None:
        """Nobody waits for it any more, and it wakes nobody. It ends with the process."""
        self._awaited = True

    def join(self) -> None:
        """Waits for the end. Raises what the stage failed by."""
        self._awaited = True
        while self._thread.is_alive():
            self._thread.join(0.2)
        if self.error is not None:
            raise self.error


@contextmanager
def _ended_together(background: Mapping[str, _Background]) -> Iterator[None]:
    """An interrupt that a failed background stage caused is told as that stage's own error."""
    try:
        yield
    except KeyboardInterrupt:
        for stage in background.values():
            if isinstance(stage.error, Exception):
                raise stage.error from None
        raise
    finally:
        for stage in background.values():
            stage.leave()

"""Watch a run from outside: its stages, how fast they are, its workers, and the store. Reads the run's log; touches nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from jobs.command import SEARCHES, Debug, Verb
from jobs.store import Root, opened, size
from puzzle_ray.errors import StoreError
from puzzle_ray.run_log import RunState, StageState, read_events, run_ids, state_of
from puzzle_ray.store.root import LOGS

RunId = Annotated[str | None, typer.Option("--run", help="A run's id, or how it begins; the latest run without it.")]
Every = Annotated[float, typer.Option("--every", min=0.5, help="Seconds between two looks.")]
Once = Annotated[bool, typer.Option("--once", help="One look, and no more; so it is in a pipe.")]


def watch(store: Root = "runs", run: RunId = None, every: Every = 2.0, once: Once = False, debug: Debug = False) -> None:
    """Watch a run from outside: its stages, how fast they are, its workers, and the store."""
    root = opened(store)
    run_id = named_run(root, run)
    if once or not sys.stdout.isatty():
        print("\n".join(lines(state_of(run_id, read_events(root, run_id)), root, time.time())))
        return
    from rich.live import Live
    from rich.text import Text

    with Live(screen=False, auto_refresh=False) as live:
        while True:
            state = state_of(run_id, read_events(root, run_id))
            live.update(Text("\n".join(lines(state, root, time.time()))), refresh=True)
            if state.ended is not None:
                return
            time.sleep(every)


def named_run(root: Any, name: str | None) -> str:
    """The id of the run that is meant. Raises StoreError."""
    known = run_ids(root)
    if not known:
        raise StoreError("store", f"no run has a log in {root.root}", f"start one; its log will be in {LOGS}/")
    found = [run_id for run_id in known if name is None or run_id.startswith(name)]
    if not found:
        raise StoreError("--run", f"there is no run {name!r}", f"the latest is {known[-1]}; `ls {root.root}/{LOGS}` shows all")
    return found[-1]


def lines(state: RunState, root: Any, now: float) -> Iterator[str]:
    """The whole picture, a line each."""
    facts = state.facts
    where = f"process {facts.get('pid', '?')} on {facts.get('host', '?')}"
    job = f", Ray job {facts['job']}" if facts.get("job") else ""
    yield f"run     {state.run_id}  {facts.get('verb', '')}, {where}{job}, puzzle_ray {facts.get('version', '?')}"
    until = state.heard if state.ended else now
    yield f"state   {state.words(now)}, {duration(until - state.began)} since it began, last word {duration(now - state.heard)} ago"
    yield ""
    width = max((len(name) for name in state.stages), default=0)
    for stage in state.stages.values():
        yield from stage_lines(stage, width, now, over=state.ended is not None)
    if state.cluster and state.ended is None:
        yield ""
        yield f"cluster {cluster_words(state.cluster)}"
        workers = ", ".join(f"{count} x {kind}" for kind, count in sorted(state.cluster.get("workers", {}).items()))
        yield f"workers {workers or 'none'}"
    yield ""
    yield f"store   {root.root}, {size(sum(state.artifacts.values()))} in this run's artifacts"
    yield f"page    {root.root}/{LOGS}/{state.run_id}/index.html"


def stage_lines(stage: StageState, width: int, now: float, over: bool) -> Iterator[str]:
    """One line for a stage, one for each bar that is under way in it."""
    state = "stopped" if over and stage.state == "running" else stage.state
    took = stage.seconds if stage.seconds is not None else now - stage.began
    when = duration(took) if state != "already there" else ""
    held = size(stage.bytes) if stage.bytes else ""
    yield f"{stage.name:<{width}}  {state:<13}  {when:>8}  {held:>9}".rstrip()
    for bar in stage.bars.values():
        yield f"{'':<{width}}    {bar_words(bar)}"


def bar_words(bar: dict[str, Any]) -> str:
    """`library: 12/40 micro-batch, 0.8/s, 1.6k tokens/s, 0:35 left, loss 0.31`."""
    done, total, rate = bar["done"], bar["total"], bar["per_s"]
    words = [f"{bar['bar']}: {done}/{total} {bar['unit']}", f"{rate:.3g}/s"]
    words += [f"{bar['tokens_per_s']:.4g} tokens/s"] if "tokens_per_s" in bar else []
    words += [f"{duration((total - done) / rate)} left"] if rate > 0 else []
    return ", ".join([*words, *(f"{name} {value:.4g}" for name, value in bar.get("facts", {}).items())])


def cluster_words(cluster: dict[str, Any]) -> str:
    """`3 nodes, CPU 6 of 8 in use, object store 12.0 MB of 1.1 GB`."""
    words = [f"{cluster['nodes']} node{'s' if cluster['nodes'] != 1 else ''}"]
    for name, (total, free) in cluster.get("resources", {}).items():
        if name == "object_store_memory":
            words.append(f"object store {size(total)}")
        else:
            words.append(f"{name} {total - free:g} of {total:g} in use")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(int(max(0.0, seconds) + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


VERB = Verb("watch", SEARCHES, watch)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)

"""Drills: for every stage something dies, fills up, is cut off or is damaged; the run ends with the undisturbed result all the same.

    python -m benchmarks.drills --out drills.json [--only library,scores] [--seed 0] [--ground FOLDER]

A small parent goes through a whole run once. A drill takes that store without one stage, runs the stage's verb, disturbs it as soon as
some of its items are done, and, where the run ends before its time, looks whether it said one clear line, and runs the same command
again. A drill is survived when the artifact is that of the undisturbed run (of a profile: the same items, for its times are measured),
no earlier stage was done again, and the disturbance hit: a drill that disturbed nothing is lost. A third of the drills have their store
on S3 (a server of their own). Drills that OUT says were survived are not held again; with `--ground` the undisturbed run is kept, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from benchmarks import faults
from benchmarks.drill_ground import VERBS, Ground, Place, Run, digest
from benchmarks.record import machine, write

PLAIN = (
    "worker",
    "node",
    "drained",
    "driver",
    "gcs",
    "sigterm",
    "disk",
    "object store",
    "unreachable",
    "straggler",
    "two runs",
    "flipped bit",
)
LEFT_OUT = {
    ("profile", "drained"),
    ("scores", "drained"),
    ("gkd", "drained"),  # so small a child is distilled before the node goes
    ("profile", "flipped bit"),
    ("profile", "object store"),
    ("gkd", "object store"),
    ("gkd", "straggler"),
}
ON_S3 = {
    *((stage, "unreachable") for stage in VERBS),
    *((stage, "driver") for stage in VERBS),
    *((stage, "worker") for stage in ("library", "scores")),
    *((stage, "sigterm") for stage in ("profile", "gkd")),
    ("library", "two runs"),
}
ON_NODES = ("node", "drained", "object store")
ENDS = ("driver", "disk", "sigterm")  # a run that ends well in spite of these was not hit
DAMAGED = {"library": "tokens", "scores": "library", "gkd": "child"}  # whose bit is flipped
NODES, STORE_MIB, FULL = 3, 100, 0.95


@dataclass
class Outcome:
    """What came of one drill."""

    stage: str
    fault: str
    on_s3: bool
    did: str = ""
    codes: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    survived: bool = False
    why_not: str = ""
    finished_items: int = 0
    redone: int = 0
    longest_silence_s: float = 0.0
    silent_after: str = ""  # what was said before it
    seconds: float = 0.0
    commit: str = ""


@dataclass
class Tools:
    """What drills share: the S3 server and the cluster of several nodes, started when a drill first wants them."""

    folder: Path
    stack: ExitStack
    server: faults.S3Server | None = None
    nodes: faults.Nodes | None = None

    def s3(self) -> faults.S3Server:
        if self.server is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            self.server = faults.S3Server(port)
            self.stack.callback(self.server.close)
            time.sleep(6)
            import s3fs

            s3fs.S3FileSystem(skip_instance_cache=True).makedirs("drills", exist_ok=True)
        return self.server

    def cluster(self) -> faults.Nodes:
        if self.nodes is None:
            self.nodes = faults.Nodes(NODES, STORE_MIB)
            self.stack.callback(self.nodes.close)
        self.nodes.fill(NODES)
        return self.nodes


def drill(ground: Ground, stage: str, fault: str, expected: Mapping[str, str], tools: Tools, rng: random.Random) -> Outcome:
    """One drill, from its own store to its outcome."""
    outcome = Outcome(stage, fault, (stage, fault) in ON_S3)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"{stage}-", dir=tools.folder))
    try:
        with place_for(ground, outcome, folder, tools) as place:
            _run(ground, outcome, place, folder, tools, rng)
            _judge(outcome, place, expected)
    except Exception as error:  # a drill that cannot be held is lost, and the next one is held
        outcome.why_not = f"{type(error).__name__}: {error}"
    shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


@contextmanager
def place_for(ground: Ground, outcome: Outcome, folder: Path, tools: Tools) -> Iterator[Place]:
    if outcome.on_s3:
        tools.s3()
        yield Place(ground, outcome.stage, f"s3://drills/{folder.name}")
    elif outcome.fault == "disk":
        with faults.small_disk(folder / "disk", 24) as disk:
            yield Place(ground, outcome.stage, str(disk / "store"))
    else:
        yield Place(ground, outcome.stage, str(folder / "store"))


def _run(ground: Ground, outcome: Outcome, place: Place, folder: Path, tools: Tools, rng: random.Random) -> None:
    """The disturbed command and, where it ended before its time, the same command again."""
    more: list[str] = []
    if outcome.fault in ON_NODES:
        more = ["--set", f"cluster.address={tools.cluster().address}"]
    if outcome.fault in ("node", "drained"):
        more += ["--set", "cluster.num_shards=2"]
    command = ground.command(VERBS[outcome.stage], place.root, *more)
    mend: Callable[[], None] = lambda: None  # noqa: E731
    if outcome.fault == "flipped bit":
        outcome.did = faults.flip_bit(place.fs, place.path, DAMAGED[outcome.stage], rng)
    if outcome.fault == "object store":
        mend, outcome.did = faults.fill_object_stores(tools.cluster().address, FULL), f"{FULL:.0%} of every object store is taken"
    first = Run(command, folder, 0)
    others = [Run(command, folder, 1)] if outcome.fault == "two runs" else []
    try:
        before: dict[str, tuple[int, str]] = {}
        if outcome.fault == "two runs":
            first.wait(place.begun)
            if all(run.step() is None for run in (first, *others)):
                outcome.did = "both ran when the first items were there"
        elif outcome.fault not in ("flipped bit", "object store"):
            first.wait(place.begun)
            before = place.items()
            if any(name.endswith(".parquet") for name in before):
                raise RuntimeError("nothing was disturbed: all items were done")
            mend = disturb(outcome, first, place, folder, tools, rng)
        codes = [run.wait() or 0 for run in (first, *others)]
        mend()
        _note(outcome, codes, (first, *others), place, before)
        if any(codes):
            finished = place.items()
            again = Run(command, folder, 2)
            others.append(again)
            _note(outcome, [again.wait() or 0], (again,), place, finished)
    finally:
        mend()
        for run in (first, *others):
            run.end()


def disturb(outcome: Outcome, run: Run, place: Place, folder: Path, tools: Tools, rng: random.Random) -> Callable[[], None]:
    """Does it, and says what it did; returns what a person would do before trying again."""
    pid, stage = run.process.pid, outcome.stage
    pids = [pid, *(tools.nodes.pids if tools.nodes else [])]
    deadline = time.monotonic() + 20
    while not outcome.did and run.step() is None and time.monotonic() < deadline:  # its workers may not be there yet
        if outcome.fault == "worker":
            outcome.did = faults.kill_worker(stage, pids, rng)
        elif outcome.fault == "straggler":
            outcome.did = faults.straggle(stage, pids, rng)
        elif outcome.fault == "node":
            outcome.did = tools.cluster().kill_one(stage, rng)
        elif outcome.fault == "drained":
            outcome.did = tools.cluster().drain_one(stage, rng)
            if run.step() is not None:  # its node outlived it
                outcome.did = ""
        elif outcome.fault == "gcs":
            outcome.did = faults.kill_named(pid, "gcs_server")
        elif outcome.fault == "driver":
            run.process.kill()
            run.end()
            outcome.did = "the driver"
        elif outcome.fault == "sigterm":
            run.process.send_signal(signal.SIGTERM)
            outcome.did = "SIGTERM"
        elif outcome.fault == "unreachable":
            outcome.did = tools.s3().away()
        elif outcome.fault == "disk":
            outcome.did = "the disk is full"
            return faults.fill_disk(folder / "disk")
    return lambda: None


def _note(outcome: Outcome, codes: list[int], runs: tuple[Run, ...], place: Place, before: Mapping[str, tuple[int, str]]) -> None:
    """Codes, silences, what was said at the end, and what of the finished was done again."""
    outcome.codes += codes
    quietest = max(runs, key=lambda run: run.silence_s)
    if quietest.silence_s > outcome.longest_silence_s:
        outcome.longest_silence_s = round(quietest.silence_s, 1)
        outcome.silent_after = f"run {len(outcome.codes) - len(codes) + 1 + runs.index(quietest)}: {quietest.silent_after}"
    for code, run in zip(codes, runs, strict=True):
        if code not in (0, -signal.SIGKILL):
            outcome.said += run.last_lines()
    after = place.items()
    outcome.finished_items += len(before)
    outcome.redone += sum(after.get(name) != value for name, value in before.items())


def _judge(outcome: Outcome, place: Place, expected: Mapping[str, str]) -> None:
    """Survived: ended well, with the undisturbed result, after one clear line at the most."""
    why = []
    if not outcome.did:
        why.append("nothing was disturbed: it was over before")
    if outcome.fault in ENDS and outcome.codes[0] == 0:
        why.append(f"nothing was disturbed: it ended well in spite of: {outcome.did}")
    if outcome.fault == "flipped bit" and not outcome.said:
        why.append("the damage was not noticed")
    again = place.earlier_done_again(but=DAMAGED[outcome.stage] if outcome.fault == "flipped bit" else "")
    if again:
        why.append(f"done beside the stage: {', '.join(again)}")
    if outcome.codes[-1] != 0:
        why.append(f"the last command ended with {outcome.codes[-1]}")
    elif place.digest() != expected:
        why.append(f"another result than the undisturbed one's: {differing(place.digest(), expected)}")
    if len(outcome.said) > 1 or any("Traceback" in line for line in outcome.said):
        why.append(f"{len(outcome.said)} lines in place of one")
    if any(code > 0 for code in outcome.codes[:-1]) and not outcome.said:
        why.append("it ended before its time without a word")
    outcome.survived, outcome.why_not = not why, "; ".join(why)


def differing(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The first file that differs, is missing or is too much."""
    return min(name for name, _ in found.items() ^ expected.items())


def all_drills(only: set[str]) -> list[tuple[str, str]]:
    return [(s, f) for f in PLAIN for s in VERBS if (s, f) not in LEFT_OUT and (not only or {s, f, f"{s}:{f}"} & only)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="stages, faults, or stage:fault, with commas between them")
    parser.add_argument("--ground", type=Path, help="where the undisturbed run is kept; else it is made anew")
    arguments = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the drills' own clusters, on loopback
    only = {word for word in arguments.only.split(",") if word}
    kept = {(row["stage"], row["fault"]): Outcome(**row) for row in rows_of(Path(arguments.out))}
    with tempfile.TemporaryDirectory(prefix="drills-") as name, ExitStack() as stack:
        folder = Path(name)
        ground, tools = Ground(arguments.ground or folder), Tools(folder, stack)
        ground.prepare()
        local = fsspec.filesystem("file")
        expected = {stage: digest(local, str(ground.base), stage) for stage in VERBS}
        for stage, fault in all_drills(only):
            if (stage, fault) in kept and kept[stage, fault].survived:
                continue
            rng = random.Random(f"{arguments.seed} {stage} {fault}")
            last = kept[stage, fault] = drill(ground, stage, fault, expected[stage], tools, rng)
            last.commit = machine()["commit"] or ""
            print(
                f"{stage:8} {fault:13} {'survived' if last.survived else 'LOST: ' + last.why_not} ({last.seconds:g} s)",
                flush=True,
            )
            outcomes = [kept[which] for which in all_drills(set()) if which in kept]
            write(arguments.out, [vars(outcome) for outcome in outcomes], summary(outcomes))
    print(summary([kept[which] for which in all_drills(set()) if which in kept]))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What an earlier series left."""
    return list(json.loads(out.read_text())["rows"]) if out.exists() else []


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "drills": len(outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "on_s3": sum(outcome.on_s3 for outcome in outcomes),
        "finished_items": sum(outcome.finished_items for outcome in outcomes),
        "finished_items_redone": sum(outcome.redone for outcome in outcomes),
        "longest_silence_s": max((outcome.longest_silence_s for outcome in outcomes), default=0.0),
    }


if __name__ == "__main__":
    main()

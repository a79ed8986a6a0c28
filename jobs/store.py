"""Look after a store: list what is in it, verify it, see what it takes, and clear what nothing needs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.command import RESULTS, Debug, Group, Verb

if TYPE_CHECKING:
    from puzzle_ray.store import Store

Root = Annotated[str, typer.Option("--store", help="The store: a folder or any fsspec URL.")]
Names = Annotated[list[str] | None, typer.Argument(help="Artifacts as `ls` names them, STAGE-KEY; all without any.")]
Days = Annotated[float, typer.Option("--older-than", min=0.0, help="Days since something was last written to.")]
Yes = Annotated[bool, typer.Option("--yes", help="Remove it. Without this it is only listed.")]
DAMAGED = 2  # the exit code


def ls(store: Root = "runs", debug: Debug = False) -> None:
    """List artifacts: stage, key, state, size, when it was last written, and one fact about it. Reads records only."""
    from puzzle_ray.store.upkeep import artifacts

    rows = [
        (one.stage, one.key, one.state, size(one.bytes), when(one.written_at), one_fact(one.facts))
        for one in artifacts(opened(store))
    ]
    show(("stage", "key", "state", "size", "written", "fact"), rows)


def verify(names: Names = None, store: Root = "runs", debug: Debug = False) -> None:
    """Read every file of the artifacts and compare it with what was written. Exit code 2 where something is damaged."""
    from puzzle_ray.store.record import OTHER_VERSION
    from puzzle_ray.store.upkeep import artifact_named, verify

    root = opened(store)
    found = verify(root, names or ())
    for name, problems in found.items():
        for problem in problems:
            print(f"{name}/{problem}")
    damaged = {name: p for name, p in found.items() if p and not p[0].what.startswith(OTHER_VERSION)}
    if not damaged:
        print(f"{len(found)} artifacts, nothing is damaged", file=sys.stderr)
        return
    marked = [artifact_named(root, name).mark_damaged(str(problems[0])) for name, problems in damaged.items()]
    remedy = "the command that made it makes what is lost again, and nothing else"
    if not all(marked):
        remedy = f"remove these files, for the store cannot be written; then {remedy}"
    stages = ", ".join(dict.fromkeys(name.rpartition("-")[0] for name in damaged))
    print(f"{len(damaged)} of {len(found)} artifacts are damaged ({stages}): {remedy}", file=sys.stderr)
    raise typer.Exit(DAMAGED)


def du(store: Root = "runs", debug: Debug = False) -> None:
    """Show how much the stages take, the largest first."""
    from puzzle_ray.store.upkeep import bytes_by_stage

    found = bytes_by_stage(opened(store))
    rows = [(stage, size(count)) for stage, count in found.items()]
    show(("stage", "size"), [*rows, ("all", size(sum(found.values())))], right=("size",))


def gc(store: Root = "runs", older_than: Days = 30.0, yes: Yes = False, debug: Debug = False) -> None:
    """List what may go, and remove it with --yes: artifacts that no finished one was made from, unfinished ones, leftovers, old logs.

    What a run works on stays, and so does what was written to within the days of --older-than, but for leftovers.
    """
    from puzzle_ray.store.upkeep import collect_garbage

    found = collect_garbage(opened(store), older_than, dry_run=not yes)
    show(("name", "size", "why"), [(one.name, size(one.bytes), one.why) for one in found])
    total = size(sum(one.bytes for one in found))
    print(f"{len(found)} removed, {total}" if yes else f"{len(found)} may go, {total}; --yes removes them", file=sys.stderr)


def opened(root: str) -> Any:
    """The store, which must be there. Raises StoreError."""
    from puzzle_ray.errors import StoreError
    from puzzle_ray.store import Store

    store = Store(root)
    if not is_there(store):
        raise StoreError("store", f"there is no store at {root!r}", "name one with --store")
    return store


def is_there(store: Store) -> bool:
    """Whether there is a store yet. Raises StoreError where that cannot be seen."""
    from puzzle_ray.errors import StoreError

    try:
        return bool(store.filesystem.isdir(store.root))
    except StoreError:
        raise
    except Exception as error:  # every backend has errors of its own
        problem = f"{store.root!r} cannot be read ({type(error).__name__}: {error})"
        raise StoreError("store", problem, "check the address and the rights") from None


def size(count: float) -> str:
    """`1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def when(seconds: float) -> str:
    """Local time, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def one_fact(facts: Mapping[str, Any]) -> str:
    """The first plain one, which is the one that matters most: `variants 30`."""
    for name, value in facts.items():
        if isinstance(value, bool | int | str):
            return f"{name} {value}"
        if isinstance(value, float):
            return f"{name} {value:.4g}"
    return ""


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ("size",)) -> None:
    """A table on a terminal; in a pipe a line of tab-separated cells for every row."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


GROUP = Group("store", RESULTS, __doc__, (Verb("ls", "", ls), Verb("verify", "", verify), Verb("du", "", du), Verb("gc", "", gc)))

if __name__ == "__main__":
    from jobs.app import main

    main(GROUP.name)

"""`puzzle-ray VERB`: one application, a sub-command for every module of this folder that declares `VERB` or `GROUP`.

This is also where errors end: what the user can mend is one line on stderr and exit code 2, a failed worker or a fault of ours is
one line and exit code 1, an interrupt is 130. Tracebacks are shown with `--debug`, else they go to a file that the line names.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.command import DEBUG_VARIABLE, Group, Verb
from puzzle_ray.errors import PuzzleError
from puzzle_ray.plugins import declared

UsageError: Any = typer.BadParameter.__base__  # click's own, which newer Typers hold inside
MINE, WORKERS, INTERRUPTED = 2, 1, 130


def _version(wanted: bool) -> None:
    if wanted:
        from puzzle_ray.version import __version__

        print(__version__)
        raise typer.Exit


def _about(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Search a faster child for a trained language model. Every verb does first what it needs; what is finished is skipped."""


def application() -> typer.Typer:
    """All verbs, by groups."""
    app = typer.Typer(name="puzzle-ray", add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
    app.callback()(_about)
    found: list[Verb] = declared("jobs", "VERB")
    for verb in found:
        app.command(verb.name, rich_help_panel=verb.group)(verb.call)
    groups: list[Group] = declared("jobs", "GROUP")
    for group in groups:
        inner = typer.Typer(name=group.name, help=group.about, no_args_is_help=True)
        for verb in group.verbs:
            inner.command(verb.name)(verb.call)
        app.add_typer(inner, rich_help_panel=group.group)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command line, without the program's name; returns its exit code."""
    return _guarded(lambda: application()(list(arguments), prog_name="puzzle-ray", standalone_mode=False))


def main(verb: str | None = None) -> None:
    """The `puzzle-ray` script; with `verb`, `python -m jobs.<verb>`."""
    sys.exit(run([*([verb] if verb else []), *sys.argv[1:]]))


def _guarded(call: Callable[[], Any]) -> int:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        code = call()
    except PuzzleError as error:
        return _say(error, MINE, str(error))
    except UsageError as error:
        return _say(
            error, MINE, f"{error.format_message()} (puzzle-ray --help lists the verbs, puzzle-ray VERB --help its options)"
        )
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        cause = getattr(error, "cause", None)  # an error of a Ray worker is itself and a RayTaskError
        if isinstance(cause, PuzzleError):
            return _say(cause, MINE, str(cause))
        reason = (str(error).strip().splitlines() or [""])[-1]
        if type(error).__module__.startswith("ray."):
            return _say(error, WORKERS, f"a Ray worker failed: {reason or type(error).__name__}", log=True)
        return _say(error, WORKERS, f"{type(error).__name__}: {reason}", log=True)
    if code == INTERRUPTED:  # Typer turns an interrupt into this code
        print("interrupted; the same command continues from here", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _say(error: BaseException, code: int, line: str, log: bool = False) -> int:
    """One line, a traceback where it is asked for, and its place in a file where it is not."""
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    elif log:
        line = f"{line}; the traceback is in {_logged(error)}"
    print(f"error: {line}", file=sys.stderr)
    return code


def _logged(error: BaseException) -> Path:
    folder = Path(tempfile.gettempdir()) / f"puzzle-ray-errors-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path.write_text(f"{sys.argv}\n" + "".join(traceback.format_exception(error)))
    return path


if __name__ == "__main__":
    main()

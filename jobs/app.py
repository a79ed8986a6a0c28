"""`puzzle-ray VERB`: one application, a sub-command for every module of this folder that declares `VERB` or `GROUP`.

This is also where errors end: what the user can mend is one line on stderr and exit code 2, a failed worker or a fault of ours is
one line and exit code 1. An interrupt is 130, SIGTERM is 143. Tracebacks are shown with `--debug`, else they go to a file that the
line names.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import endings
from jobs.command import DEBUG_VARIABLE, Group, Verb
from puzzle_ray.errors import PluginError, PuzzleError
from puzzle_ray.plugins import declared
from puzzle_ray.process import start_quickly

UsageError: Any = typer.BadParameter.__base__  # click's own, which newer Typers hold inside
MINE, WORKERS = 2, 1


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
    start_quickly()
    endings.keep_stderr()
    endings.ended(run([*([verb] if verb else []), *sys.argv[1:]]))


def _guarded(call: Callable[[], Any]) -> int:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # when one answer is an error, the others are not waited for
    with endings.handled() as signals:
        try:
            code = call()
        except (KeyboardInterrupt, typer.Abort):
            code = endings.INTERRUPTED
        except Exception as error:
            signals.check_ray()
            if signals.first is None:
                return _told(error)
            code = endings.INTERRUPTED  # it failed on the way to its end
        if code == endings.INTERRUPTED:  # Typer turns an interrupt into this code
            signals.say(endings.LINE)
            return signals.code
    return code if isinstance(code, int) else 0


def _told(error: Exception) -> int:
    """Says in one line what is wrong; returns the exit code."""
    if isinstance(error, UsageError):
        remedy, problem = "(puzzle-ray --help lists the verbs, puzzle-ray VERB --help its options)", error.format_message()
        return _say(error, MINE, f"{problem} {remedy}") if problem else MINE  # without a verb, the help was shown
    cause = getattr(error, "cause", None)  # an error of a Ray worker is itself and a RayTaskError
    for known in (cause, error):  # the cause has the plain words
        if isinstance(known, PluginError):
            return _say(known, MINE, str(known), log=True)
        if isinstance(known, PuzzleError):
            return _say(known, MINE, str(known))
    reason = (str(error).strip().splitlines() or [""])[-1]
    if type(error).__module__.startswith("ray."):
        return _say(error, WORKERS, f"a Ray worker failed: {reason or type(error).__name__}{_promise(error)}", log=True)
    return _say(error, WORKERS, f"{type(error).__name__}: {reason}", log=True)


def _promise(error: Exception) -> str:
    """What failed for want of memory or because a process or node died goes on; what failed in code fails again."""
    from ray import exceptions

    passing = (
        *(exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError),
        *(exceptions.ObjectLostError, exceptions.LocalRayletDiedError),
    )
    own = getattr(error, "actor_init_failed", False)  # its constructor raised
    return f"; {endings.CONTINUES}" if isinstance(error, passing) and not own else ""


def _say(error: BaseException, code: int, line: str, log: bool = False) -> int:
    """One line, a traceback where it is asked for, and its place in a file where it is not."""
    if os.environ.get(DEBUG_VARIABLE):
        print(_traceback(error), end="", file=sys.stderr)
    elif log:
        line = f"{line}; the traceback is in {_logged(error)}"
    print(f"error: {line}", file=sys.stderr)
    return code


def _traceback(error: BaseException) -> str:
    """Of a plug-in's error, the plug-in's own: it may have been raised on another machine."""
    return error.args[4] if isinstance(error, PluginError) else "".join(traceback.format_exception(error))


def _logged(error: BaseException) -> Path:
    path = endings.log_file("error")
    path.write_text(f"{sys.argv}\n{_traceback(error)}")
    return path


if __name__ == "__main__":
    main()

"""`puzzle-ray <verb>`: the same commands as `python -m jobs.<verb>`, and what all of them share."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puzzle_ray.errors import ConfigError, PuzzleError

if TYPE_CHECKING:
    from jobs.stages import Run

HELPERS = {"cli", "checks", "session", "stages"}


def verbs() -> list[str]:
    import jobs

    return sorted(info.name for info in pkgutil.iter_modules(jobs.__path__) if info.name not in HELPERS)


def stage_command(work: Callable[[Run], None], about: str, needs_ray: bool = True) -> Callable[..., None]:
    """A command line with the options every stage has; `work` does it on a checked run within a Ray session."""

    def main(
        recipe: Annotated[str | None, typer.Option(help="A recipe that comes with the package, such as tiny.")] = None,
        config: Annotated[str | None, typer.Option(help="A YAML file of settings.")] = None,
        set_: Annotated[list[str] | None, typer.Option("--set", help="One setting, section.key=value; may be repeated.")] = None,
        parent: Annotated[str | None, typer.Option(help="tiny, a Hugging Face folder, or a hub id.")] = None,
        data: Annotated[str | None, typer.Option(help="Training text: file, folder, glob, URL, or a datasets hub id.")] = None,
        store: Annotated[str | None, typer.Option(help="Where artifacts are kept: a folder or any fsspec URL.")] = None,
    ) -> None:
        run = configured(recipe, config, set_, parent, data, store)
        run.check()
        if not needs_ray:
            work(run)
            return
        from jobs.checks import check_cluster
        from jobs.session import connected

        with connected(run.config.cluster, window_bytes(run)):
            check_cluster(run.config)
            work(run)

    main.__doc__ = about
    return main


def configured(
    recipe: str | None, config: str | None, overrides: list[str] | None, parent: str | None, data: str | None, store: str | None
) -> Run:
    """The run that a command line asks for. Raises ConfigError."""
    from jobs.stages import Run
    from puzzle_ray.config import load

    words = list(overrides or [])
    for name, value in (("parent", parent), ("data.train", data), ("store", store)):
        if value is not None:
            words.append(f"{name}={json.dumps(value)}")  # JSON strings are YAML
    loaded = load(recipe, config, tuple(words))
    if (
        "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        and "://" not in loaded.store
        and not os.path.isabs(os.path.expanduser(loaded.store))
    ):
        problem = f"{loaded.store!r} is relative, and a submitted job's working folder is thrown away"
        raise ConfigError("store", problem, "give --store an absolute path that all nodes share, or a URL")
    return Run(loaded)


def window_bytes(run: Run) -> int:
    """What the library's micro-batches in flight take in the object store at the most; 0 for the tiny parent: any store is big enough."""
    from actors.data_plane import Flow

    if run.config.parent == "tiny":
        return 0
    return Flow.of(run.config.library, run.model_config.hidden_size).bound_bytes(run.model_config.num_hidden_layers + 1)


def run_main(main: Callable[..., None]) -> None:
    """Runs one command: what the user can mend is one line on stderr and exit code 2, an interrupt is 130."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    guarded(app)


def guarded(call: Callable[[], Any]) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        call()
    except PuzzleError as error:
        cause = getattr(error, "cause", None)  # an error that came from a Ray worker is itself and a RayTaskError
        print(f"error: {cause if isinstance(cause, PuzzleError) else error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not type(error).__module__.startswith("ray."):
            raise  # ours to mend: the traceback is wanted
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        print(f"error: a Ray worker failed: {last}; the same command continues from here", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """The `puzzle-ray` script."""
    arguments = sys.argv[1:]
    names = {name.replace("_", "-"): name for name in verbs()}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: puzzle-ray VERB [OPTIONS]\n\nverbs: " + ", ".join(names) + "\n\npuzzle-ray VERB --help says more.")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from puzzle_ray import __version__

        print(__version__)
        return
    verb = arguments[0].replace("_", "-")
    if verb not in names:
        from puzzle_ray.plugins import did_you_mean

        print(f"error: unknown verb {arguments[0]!r}; {did_you_mean(verb, names)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"puzzle-ray {verb}", *arguments[1:]]
    run_main(importlib.import_module(f"jobs.{names[verb]}").main)


if __name__ == "__main__":
    main()

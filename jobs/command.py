"""What the verbs share: their options, the run that a command line asks for, and a verb that does some stages."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puzzle_ray.errors import ConfigError

if TYPE_CHECKING:
    from jobs.run import Run
    from puzzle_ray.config import RunConfig

STAGES, SEARCHES, RESULTS = "Stages", "The whole", "Results"  # groups of `puzzle-ray --help`
DEBUG_VARIABLE = "PUZZLE_RAY_DEBUG"


def _set_debug(wanted: bool) -> bool:
    if wanted:
        os.environ[DEBUG_VARIABLE] = "1"
    return wanted


Recipe = Annotated[
    str | None,
    typer.Option(help="A recipe that comes with the package, such as tiny; several by commas, each on top of the one before."),
]
Config = Annotated[
    list[str] | None, typer.Option(help="A YAML file of settings; may be repeated, each on top of the one before.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting, section.key=value; may be repeated.")]
ParentName = Annotated[str | None, typer.Option("--parent", help="tiny, a Hugging Face folder, or a hub id.")]
Data = Annotated[str | None, typer.Option(help="Training text: file, folder, glob, URL, or a datasets hub id.")]
StoreRoot = Annotated[str | None, typer.Option(help="Where artifacts are kept: a folder or any fsspec URL.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show tracebacks.")]


@dataclass(frozen=True)
class Verb:
    """One sub-command: its name on the command line, the group it is listed in, and the function behind it."""

    name: str
    group: str
    call: Callable[..., None]


@dataclass(frozen=True)
class Group:
    """A sub-command with sub-commands of its own: its name, the group it is listed in, what it is for, and its verbs."""

    name: str
    group: str
    about: str | None
    verbs: tuple[Verb, ...]


def stage_verb(
    name: str, about: str | None, group: str, work: Callable[[Run], None], needs_ray: bool = True, rounds: bool = True
) -> Verb:
    """A verb with the options that every stage has.

    `work` is given a checked run, within a Ray session where it needs one: its last round, when the others are done, or its first one
    where `rounds` is false.
    """

    def call(
        recipe: Recipe = None,
        config: Config = None,
        set_: Settings = None,
        parent: ParentName = None,
        data: Data = None,
        store: StoreRoot = None,
        debug: Debug = False,
    ) -> None:
        run = configured(recipe, config, set_, parent, data, store)
        from jobs.hardware import settled
        from jobs.observed import observed

        if not needs_ray:
            run.check()
            with observed(run, name):
                work(run.last_round() if rounds else run)
            return
        from jobs.checks import check_cluster
        from jobs.session import connected, joins

        later = run.config.hardware is not None and joins(run.config.cluster)  # the cluster must be joined to be looked at
        run = run if later else settled(run)
        if later:
            run.store.check()
        else:
            run.check()
        with connected(run.config.cluster, 0 if later else window_bytes(run)):
            if later:
                run = settled(run)
                run.check()
            with observed(run, name):
                check_cluster(run.config)
                work(run.last_round() if rounds else run)

    call.__doc__ = about
    return Verb(name, group, call)


def loaded(
    recipe: str | None,
    config: list[str] | None,
    overrides: list[str] | None,
    parent: str | None,
    data: str | None,
    store: str | None,
) -> RunConfig:
    """The settings that a command line asks for. Raises ConfigError."""
    from puzzle_ray.config import load

    words = list(overrides or [])
    for name, value in (("parent", parent), ("data.train", data), ("store", store)):
        if value is not None:
            words.append(f"{name}={json.dumps(value)}")  # JSON strings are YAML
    return load(recipe, config, tuple(words))


def configured(
    recipe: str | None,
    config: list[str] | None,
    overrides: list[str] | None,
    parent: str | None,
    data: str | None,
    store: str | None,
) -> Run:
    """The run that a command line asks for. Raises ConfigError."""
    from jobs.run import Run

    found = loaded(recipe, config, overrides, parent, data, store)
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and "://" not in found.store and not os.path.isabs(os.path.expanduser(found.store)):
        problem = f"{found.store!r} is relative, and a submitted job's working folder is thrown away"
        raise ConfigError("store", problem, "give --store an absolute path that all nodes share, or a URL")
    return Run(found)


def window_bytes(run: Run) -> int:
    """What is in flight in the object store at the most, of text or of micro-batches; 0 for the tiny parent: any store is big enough."""
    from actors.data_plane import Flow, text_bytes
    from puzzle_ray.config import TINY
    from puzzle_ray.process import num_cores

    if run.config.parent == TINY:
        return 0
    model_config: Any = run.parent.model_config
    shards = min(run.config.cluster.num_shards, model_config.num_hidden_layers)
    states = (shards if run.config.cluster.colocate else model_config.num_hidden_layers) + 1
    masked = run.config.data.document_mask
    flow = Flow.of(run.config.library, model_config.hidden_size, shards, masked).bound_bytes(states)
    return max(flow, text_bytes(run.config.data, num_cores()))

"""Writes a child to a folder of a user's, in one of the formats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.export.deci_checkpoint import export_nemotron_nas
from puzzle_ray.models.card import add_evaluation, evaluation_facts
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import load_model, quiet_transformers, read_config, save_child
from puzzle_ray.store import Artifact
from puzzle_ray.store.address import artifact_at, artifact_in

EVALUATION, FILE = "evaluation", "evaluation.json"  # the stage, and what it writes
CALLED = {"gkd": "child", "child": "child_before_gkd"}  # there, by the stage that made it


def export_to(child: str, target: Path, target_format: str, engines: Sequence[str], untie: bool = False) -> list[str]:
    """Writes the child to `target` and returns what to tell, a line each.

    Raises ParentError where `child` is no child, ConfigError where `target` is not empty, and both for what an engine could not run.
    """
    folder = locate(child)
    config = read_config(folder)
    if not getattr(config, "puzzle_layers", None):
        raise ParentError("child", f"{child!r} is no child of this package", "give the folder that compress prints last")
    _check_target(target)
    evaluated = evaluation_of(child)
    with quiet_transformers():
        if target_format == "nemotron_nas":
            export_nemotron_nas(folder, target, engines, untie)
            said = [f"{target}: nemotron_nas, by the rules of {', '.join(engines)}"]
        else:
            child_model = load_model(folder)
            target.mkdir(parents=True, exist_ok=True)
            save_child(child_model, folder, target)
            said = [f"{target}: native; transformers and vLLM load it with trust_remote_code"]
    if evaluated is not None:
        artifact, name = evaluated
        add_evaluation(config, target, evaluation_facts(artifact.read_json(FILE), name))
        said.append(f"the model card has the figures of {artifact.name}")
    return said


def _check_target(target: Path) -> None:
    """Raises ConfigError where no folder can be written."""
    if os.path.exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("out", f"{str(target)!r} is there already", "name a folder that is empty or absent")
    above = next(folder for folder in (target.absolute(), *target.absolute().parents) if os.path.exists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "may not be written to" if above.is_dir() else "is no folder"
        raise ConfigError("out", f"{str(target)!r} cannot be made: {above} {reason}", "name another folder")


def evaluation_of(child: str) -> tuple[Artifact, str] | None:
    """The latest evaluation of a child in a run's store, and what the child is called there. None where there is none."""
    found = artifact_at(child)
    if found is None or found[0].stage not in CALLED:
        return None
    own, store = found[0], found[0].store
    latest: tuple[str, Artifact] | None = None
    for name in store.names(store.root):
        if name.rpartition("-")[0] == EVALUATION:
            artifact = artifact_in(store, name)
            record = artifact.record()
            if (
                record is not None
                and record.inputs.get(own.stage) == own.key
                and (latest is None or record.finished_at > latest[0])
            ):
                latest = record.finished_at, artifact
    return None if latest is None else (latest[1], CALLED[own.stage])

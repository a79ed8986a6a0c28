"""Writes a child to a folder of a user's, in one of the formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.export.deci_checkpoint import export_nemotron_nas
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import load_model, quiet_transformers, read_config, save_child


def export_to(child: str, target: Path, target_format: str, engines: Sequence[str], untie: bool = False) -> list[str]:
    """Writes the child to `target` and returns what to tell, a line each.

    Raises ParentError where `child` is no child, ConfigError where `target` is not empty, and both for what an engine could not run.
    """
    folder = locate(child)
    config = read_config(folder)
    if not getattr(config, "puzzle_layers", None):
        raise ParentError("child", f"{child!r} is no child of this package", "give the folder that compress prints last")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("out", f"{str(target)!r} is there already", "name a folder that is empty or absent")
    with quiet_transformers():
        if target_format == "nemotron_nas":
            export_nemotron_nas(folder, target, engines, untie)
            return [f"{target}: nemotron_nas, by the rules of {', '.join(engines)}"]
        target.mkdir(parents=True, exist_ok=True)
        save_child(load_model(folder), folder, target)
    return [f"{target}: native; transformers and vLLM load it with trust_remote_code"]

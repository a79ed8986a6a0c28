"""The block library: every variant of every layer, trained to mimic its parent block (BLD)."""

from __future__ import annotations

from typing import Any

from jobs.run import Run, Stage
from jobs.stages import profile, tokens
from puzzle_ray.store import Artifact
from puzzle_ray.version import torch_series


def settings(run: Run) -> dict[str, Any]:
    config = run.config
    about = {"seed": config.seed, "torch": torch_series(), "cluster": config.cluster.library_identity()}
    return {"library": config.library.identity()} | about


def _start(run: Run) -> Any:
    from puzzle_ray.distill.library import starting_library

    return starting_library(run.config.library, run.space, run.parent.key)


def sources(run: Run) -> dict[str, str]:
    from puzzle_ray.variants.space import space_sources

    start = _start(run)
    found = {"parent": run.parent.key} | space_sources(run.space) | tokens.train_source(run)
    return found | ({"start": start.artifact.key} if start else {})


def work(run: Run, artifact: Artifact) -> None:
    from actors.library_stream import build_library

    config, start = run.config.library, _start(run)
    if start:
        config = config.model_copy(update={"start_from": start.artifact.url})  # every node finds it there
    profile.check_budget(run)
    train, _ = tokens.read(run)
    build_library(run.parent.address, run.space, config, run.config.cluster, train, run.config.seed, artifact, run.progress)


def foreseen(run: Run) -> None:
    """Raises DataError where validation would leave no text to train on."""
    from puzzle_ray.distill.text import LibraryText

    LibraryText.of(tokens.read(run)[0], run.config.seed, run.config.library)


def said(facts: Any) -> str:
    from puzzle_ray.distill.library import library_summary

    return library_summary(facts)


def read(run: Run) -> Any:
    """A `puzzle_ray.distill.library.Library`."""
    from puzzle_ray.distill.library import Library

    return Library(run.content("library"))


STAGE = Stage("library", work, reads=("tokens",), settings=settings, sources=sources, said=said, foreseen=foreseen)

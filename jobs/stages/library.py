"""The block library: every variant of every layer, trained to mimic its parent block (BLD)."""

from __future__ import annotations

from typing import Any

from jobs.run import Run, Stage
from jobs.stages import architecture, profile, tokens
from puzzle_ray.store import Artifact
from puzzle_ray.version import torch_series


def settings(run: Run) -> dict[str, Any]:
    config = run.config
    about = {"seed": config.seed, "torch": torch_series(), "cluster": config.cluster.library_identity()}
    return {"library": config.library.for_parent(run.parent.model_config).identity()} | about | config.data.mask_identity()


def _start(run: Run) -> Any:
    from puzzle_ray.distill.library import starting_library

    return starting_library(run.config.library, run.space, run.parent.key)


def sources(run: Run) -> dict[str, str]:
    from puzzle_ray.variants.space import space_sources

    start = _start(run)
    found = {"parent": run.parent.key} | space_sources(run.space) | tokens.train_source(run)
    found |= {"start": start.artifact.key} if start else {}
    kept = _unchanged(run)
    return found | ({"carried over": f"{run.after.content('library').key} {list(kept)}"} if run.after and kept else {})


def _unchanged(run: Run) -> tuple[int, ...]:
    """The layers whose variants are those of the round before."""
    from puzzle_ray.search.rounds import unchanged_layers

    return unchanged_layers(architecture.read(run.after).choices) if run.after else ()


def work(run: Run, artifact: Artifact) -> None:
    from actors.library_stream import build_library
    from puzzle_ray.distill.library import carry_over

    config, start = run.config.library, _start(run)
    if start:
        config = config.model_copy(update={"start_from": start.artifact.url})  # every node finds it there
    profile.check_budget(run)
    train, _ = tokens.read(run)
    if run.after:
        carry_over(run.after.content("library"), _unchanged(run), run.space, artifact)
    build_library(run.parent.address, run.space, config, run.config.cluster, train, run.config.seed, artifact, run.progress)


def foreseen(run: Run) -> None:
    """Raises DataError where validation would leave no text to train on."""
    from puzzle_ray.distill.text import LibraryText

    LibraryText.of(tokens.read(run)[0], run.config.seed, run.config.library.for_parent(run.parent.model_config))


def said(facts: Any) -> str:
    from puzzle_ray.distill.library import library_summary

    return library_summary(facts)


def read(run: Run) -> Any:
    """A `puzzle_ray.distill.library.Library`."""
    from puzzle_ray.distill.library import Library

    return Library(run.content("library"))


STAGE = Stage("library", work, reads=("tokens",), settings=settings, sources=sources, said=said, foreseen=foreseen)

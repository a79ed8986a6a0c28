"""The tiny parent: a small Llama that learns to tell short stories, once for a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.run import Run, Stage
from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.store import Artifact


def _spec(config: RunConfig) -> Any:
    from puzzle_ray.recipes.tiny_parent import TinyParentSpec

    return TinyParentSpec(seed=config.seed, steps=config.tiny_parent_steps)


def settings(run: Run) -> dict[str, Any]:
    from puzzle_ray.recipes.tiny_parent import source_fingerprint

    return {"fingerprint": source_fingerprint(_spec(run.config))}


def work(run: Run, artifact: Artifact) -> None:
    from puzzle_ray.recipes.tiny_parent import make_tiny_parent

    make_tiny_parent(artifact, _spec(run.config), run.progress)


def said(facts: Mapping[str, Any]) -> str:
    return (
        f"tiny parent: {facts['num_parameters'] / 1e6:.2f}M parameters, held-out loss {facts['heldout_loss']:.3f} nats a token "
        f"(unigram entropy {facts['unigram_entropy']:.3f})"
    )


STAGE = Stage("tiny_parent", work, settings=settings, wanted=lambda config: config.parent == TINY, said=said)

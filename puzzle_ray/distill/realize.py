"""Puts a child together from the parent's checkpoint and a block library, and publishes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ParentError
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import assemble, load_model, save_child
from puzzle_ray.store import Artifact


def realize(parent: str, choices: Sequence[LayerChoice], library: Artifact, artifact: Artifact) -> None:
    """Assembles the child in the parent's dtype and publishes it as the folder `child` of `artifact`.

    Raises ParentError where the saved child, loaded again, does not give the same logits bit for bit.
    """
    from puzzle_ray.distill.library import Library
    from puzzle_ray.models.child import quiet_transformers, read_config

    folder = locate(parent)
    config = read_config(folder)
    trained = {(i, kind): state for i, c in enumerate(choices) for kind, state in Library(library).states(i, c).items()}
    dtype = getattr(config, "dtype", None) or torch.float32
    with quiet_transformers(), artifact.folder_to_publish("child") as target:
        child = assemble(folder, config, choices, trained, dtype)
        save_child(child, folder, target, {"assembled": "the parent's weights, and blocks of a library", "library": library.key})
        ids = torch.arange(32).remainder(config.vocab_size).unsqueeze(0)
        with torch.inference_mode():
            if not torch.equal(child(ids).logits, load_model(target).eval()(ids).logits):
                raise ParentError("child", "the saved child does not give the logits it was saved with", "report this as a bug")
    artifact.finish({"num_params": child.num_parameters(), "dtype": str(dtype).removeprefix("torch.")})

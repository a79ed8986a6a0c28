"""The text in tokens of the parent's vocabulary, train and held-out."""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs.run import Run, Stage
from puzzle_ray.config import TINY
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.store import Artifact

TOKENS = "tokens.safetensors"


def _data(run: Run) -> DataConfig:
    """The text as configured; the tiny parent brings its own."""
    data = run.config.data
    if run.config.parent != TINY or data.train is not None:
        return data
    folder = run.content("tiny_parent").local_folder("parent")
    return data.model_copy(update={"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")})


def settings(run: Run) -> dict[str, Any]:
    return {"data": _data(run).identity()}


def sources(run: Run) -> dict[str, str]:
    from puzzle_ray.data.sources import source_fingerprint

    data = _data(run)
    named = {name: source_fingerprint(source) for name, source in (("train", data.train), ("heldout", data.heldout)) if source}
    return {"parent": run.parent.key, **named}


def work(run: Run, artifact: Artifact) -> None:
    import torch
    from transformers import AutoTokenizer

    from puzzle_ray.data.tokenising import tokenise

    tokenizer = AutoTokenizer.from_pretrained(run.parent.folder)
    train, heldout = tokenise(_data(run), tokenizer, run.parent.max_positions)
    tensors = {"train": torch.from_numpy(train.sequences), "heldout": torch.from_numpy(heldout.sequences)}
    artifact.write_tensors(TOKENS, tensors)
    artifact.finish({"train_tokens": train.num_tokens, "heldout_tokens": heldout.num_tokens})


def read(run: Run) -> tuple[Tokens, Tokens]:
    """(train, held-out)."""
    tensors, _ = run.content("tokens").read_tensors(TOKENS)
    return Tokens(tensors["train"].numpy()), Tokens(tensors["heldout"].numpy())


def heldout_batches(run: Run, tokens: int, sequences: int) -> list[np.ndarray[Any, Any]]:
    """The first `tokens` held-out tokens: ids `[sequences, sequence_length]` each."""
    return [batch.numpy() for batch in read(run)[1].first(tokens, sequences)]


STAGE = Stage("tokens", work, reads=("tiny_parent",), settings=settings, sources=sources)

"""The text in tokens of the parent's vocabulary, train and held-out."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

import numpy as np

from jobs.run import Run, Stage
from puzzle_ray.config import TINY
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.packing import masked_by
from puzzle_ray.data.parts import HeldoutParts, heldout_parts
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.splits import load_tokens, save_tokens, telling, tokens_summary, train_tokens_source, write_tokens
from puzzle_ray.store import Artifact


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
    from puzzle_ray.data.sources import source_inputs

    return {"parent": run.parent.key} | source_inputs(_data(run))


def work(run: Run, artifact: Artifact) -> None:
    """In this process, or where there is a cluster and much text by workers on it; the tokens are the same."""
    from puzzle_ray.models.tokenizer import read_tokenizer

    parent, data, cluster = run.parent, _data(run), run.config.cluster
    vocab_size, trusted = parent.model_config.vocab_size, run.config.trust_remote_code
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        from actors.tokenisers import OnRay, ParentTokenizer, num_tokenisers

        workers, named = num_tokenisers(data, cluster), ParentTokenizer(parent.address, trusted)
        if workers:
            with (
                telling(data, run.progress) as told,
                closing(OnRay(named, artifact, vocab_size, cluster, workers, told)) as on_ray,
            ):
                write_tokens(data, parent.max_positions, artifact, on_ray, on_ray.train_hash)
            return
    tokenizer = read_tokenizer(parent.folder, trusted)
    save_tokens(data, tokenizer, parent.max_positions, artifact, vocab_size, run.progress)


def foreseen(run: Run) -> None:
    """Raises ConfigError or DataError for a prompt or questions that the tiny parent cannot read; others were looked at before."""
    from puzzle_ray.checks import check_asked
    from puzzle_ray.models.tokenizer import read_tokenizer

    if run.config.parent == TINY:
        check_asked(run.config, read_tokenizer(run.parent.folder, run.config.trust_remote_code), run.parent.model_config)


def read(run: Run) -> tuple[Tokens, Tokens]:
    """(train, held-out)."""
    return load_tokens(run.content("tokens"), separator(run))


def separator(run: Run) -> int | None:
    """The token that documents begin with, where attention does not cross them (`data.document_mask`)."""
    from puzzle_ray.models.tokenizer import read_tokenizer

    if not run.config.data.document_mask:
        return None
    return masked_by(read_tokenizer(run.original.parent.folder, run.config.trust_remote_code))


def parts(run: Run) -> HeldoutParts:
    """Held-out text in three parts that share no sequence: what scores blocks, what picks the child, what is reported."""
    config = run.config
    return heldout_parts(read(run)[1], config.scoring.tokens, config.pick_tokens, config.evaluate.tokens)


def train_source(run: Run) -> dict[str, str]:
    """What is trained on is identified by the content of the train tokens alone."""
    return train_tokens_source(run.content("tokens"))


def batches(part: Tokens, tokens: int, sequences: int) -> list[np.ndarray[Any, Any]]:
    """The first `tokens` of a part: ids `[sequences, sequence_length]` each."""
    return [batch.numpy() for batch in part.first(tokens, sequences)]


STAGE = Stage("tokens", work, reads=("tiny_parent",), settings=settings, sources=sources, said=tokens_summary, foreseen=foreseen)

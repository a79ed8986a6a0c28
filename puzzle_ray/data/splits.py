"""The tokens of a run in the store: train and held-out, and the parts of held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from puzzle_ray.data.documents import TextFacts
from puzzle_ray.data.order import TokenArray, Tokens
from puzzle_ray.data.parts import part_sizes
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.shards import ArtifactShards, TokenShards
from puzzle_ray.data.tokenising import tokenise_into
from puzzle_ray.errors import DataError
from puzzle_ray.store import Artifact

TOKENS = "tokens.safetensors"  # both splits in one file, as earlier versions wrote them
INDEX = "tokens.json"  # which shards make up which split
TRAIN_HASH = "train_sha256"  # a fact of the artifact


def save_tokens(
    config: DataConfig, tokenizer: Any, max_positions: int | None, artifact: Artifact, vocab_size: int | None = None
) -> None:
    """Tokenises the text into shards and closes the artifact. Goes on behind the shards that are there.

    Raises DataError, also for text with tokens beyond an embedding of `vocab_size` rows.
    """
    read: dict[str, TextFacts] = {}

    def look(ids: TokenArray) -> None:
        largest = int(ids.max()) if ids.size else 0
        if vocab_size is not None and largest >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(largest)
            problem = f"the text has {token!r}, and the parent's embedding of {vocab_size} rows none for that token ({largest})"
            raise DataError("data", problem, f"take {token!r} out of the text")

    splits = tokenise_into(ArtifactShards(artifact, look), config, tokenizer, max_positions, read)
    index = {"length": config.sequence_length, "splits": {name: asdict(split) for name, split in splits.items()}}
    if not artifact.exists(INDEX):
        artifact.write_json(INDEX, index)
    train, heldout = load_tokens(artifact)
    part_sizes(heldout.num_sequences, (1, 1, 1))  # too little is said here, and not when the library is trained
    counts = {"train_tokens": train.num_tokens, "heldout_tokens": heldout.num_tokens}
    text = {name: facts.line() for name, facts in read.items()}
    artifact.finish(counts | {"text": text, TRAIN_HASH: train.content_hash()})


def train_tokens_source(artifact: Artifact) -> dict[str, str]:
    """What trains on finished tokens is identified by: the train tokens alone, by their content.

    Settings and text of the held-out part may change, and what was trained is found again as long as the train tokens are the same.
    """
    return {"train tokens": str(artifact.facts()[TRAIN_HASH])}


def load_tokens(artifact: Artifact) -> tuple[Tokens, Tokens]:
    """(train, held-out). Shards are read when they are needed."""
    if artifact.exists(TOKENS):
        tensors, _ = artifact.read_tensors(TOKENS)
        return Tokens(tensors["train"].numpy()), Tokens(tensors["heldout"].numpy())
    index = artifact.read_json(INDEX)

    def split(name: str) -> Tokens:
        entry = index["splits"][name]
        first, end = entry["rows"]
        return Tokens(TokenShards(artifact, entry["shards"], entry["counts"], index["length"], (first, end)))

    return split("train"), split("heldout")


def tokens_summary(facts: Mapping[str, Any]) -> str:
    """One line about finished tokens, from the facts of their artifact: what was read, what was dropped, how many tokens."""
    counts = f"{facts['train_tokens']} tokens to train on, {facts['heldout_tokens']} held out"
    return "; ".join([f"{name}: {line}" for name, line in facts["text"].items()] + [counts])

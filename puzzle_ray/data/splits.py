"""The tokens of a run in the store: train and held-out, and the parts of held-out text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from puzzle_ray.data.order import Tokens
from puzzle_ray.data.parts import part_sizes
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.shards import ArtifactShards, TokenShards, shard_name
from puzzle_ray.data.sources import likely_characters
from puzzle_ray.data.tokenising import SPLITS, Here, Tokeniser, tokenise_into
from puzzle_ray.progress import Progress, Quiet
from puzzle_ray.store import Artifact

TOKENS = "tokens.safetensors"  # both splits in one file, as earlier versions wrote them
INDEX = "tokens.json"  # which shards make up which split
TRAIN_HASH = "train_sha256"  # a fact of the artifact
QUIET = Quiet()


def save_tokens(
    config: DataConfig,
    tokenizer: Any,
    max_positions: int | None,
    artifact: Artifact,
    vocab_size: int | None = None,
    progress: Progress = QUIET,
) -> None:
    """Tokenises the text into shards, in this process, and closes the artifact. Passes by the shards that are there.

    Raises DataError, also for text with tokens beyond an embedding of `vocab_size` rows.
    """
    with telling(config, progress) as told:
        here = Here(ArtifactShards(artifact, tokenizer, vocab_size), tokenizer, told)
        write_tokens(config, max_positions, artifact, here, train_hash)


@contextmanager
def telling(config: DataConfig, progress: Progress) -> Iterator[Callable[[int], None]]:
    """A function that is told of characters that are done. How many there are in all is a guess, which is never gone beyond."""
    total = left = max(1, likely_characters(config))
    with progress.stage("tokens", total, "character") as bar:

        def told(characters: int) -> None:
            nonlocal left
            bar.advance(min(characters, left))
            left -= min(characters, left)

        yield told


def write_tokens(
    config: DataConfig,
    max_positions: int | None,
    artifact: Artifact,
    tokeniser: Tokeniser,
    hashed: Callable[[Artifact], str],
) -> None:
    """The same with the work done by `tokeniser`. `hashed` is `train_hash`, or calls it where tokens may be read."""
    done = tokenise_into(tokeniser, config, max_positions)
    index = {"length": config.sequence_length, "splits": {name: asdict(split) for name, split in done.splits.items()}}
    if not artifact.exists(INDEX) or artifact.read_json(INDEX) != json.loads(json.dumps(index)):  # an earlier version's
        artifact.write_json(INDEX, index)
    counts = {f"{name}_tokens": split.num_sequences * config.sequence_length for name, split in done.splits.items()}
    part_sizes(done.splits["heldout"].num_sequences, (1, 1, 1))  # too little is said here, and not when the library is trained
    totals: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}  # of all sources
    for source in done.sources:
        totals[source.name].update(source.tokens)
    several = {name: totals[name] if len(config.sources(name)) > 1 else None for name in SPLITS}
    text = {source.where.removeprefix("data."): source.line(several[source.name]) for source in done.sources}
    facts = {"text": text, "sources": [source.to_json() for source in done.sources]}
    used = {shard_name(split.shards, n) for split in done.splits.values() for n in range(len(split.tokens))}
    there = {f"{folder}/{name}" for folder in (*SPLITS, "all") for name in artifact.names(folder)}
    artifact.finish(counts | facts | {TRAIN_HASH: hashed(artifact)}, drop=there - used)


def train_hash(artifact: Artifact, told: Callable[[], object] = lambda: None) -> str:
    """What the train tokens are identified by. `told` hears of every part that is read."""
    return load_tokens(artifact)[0].content_hash(told=told)


def train_tokens_source(artifact: Artifact) -> dict[str, str]:
    """What trains on finished tokens is identified by: the train tokens alone, by their content.

    Settings and text of the held-out part may change, and what was trained is found again as long as the train tokens are the same.
    """
    return {"train tokens": str(artifact.facts()[TRAIN_HASH])}


def load_tokens(artifact: Artifact, separator: int | None = None) -> tuple[Tokens, Tokens]:
    """(train, held-out). Shards are read when they are needed. `separator`: see `Tokens`."""
    if artifact.exists(TOKENS):
        tensors, _ = artifact.read_tensors(TOKENS)
        train, heldout = (Tokens(tensors[name].numpy(), separator=separator) for name in SPLITS)
        return train, heldout
    index = artifact.read_json(INDEX)

    def split(name: str) -> Tokens:
        entry, length = index["splits"][name], index["length"]
        first, end = entry["rows"]
        # earlier versions counted sequences, and let none begin in one shard and end in another
        tokens = entry["tokens"] if "tokens" in entry else [count * length for count in entry["counts"]]
        return Tokens(TokenShards(artifact, entry["shards"], tokens, length, (first, end)), separator=separator)

    return split("train"), split("heldout")


def tokens_summary(facts: Mapping[str, Any]) -> str:
    """One line about finished tokens, from the facts of their artifact: what was read, what was dropped, how many tokens."""
    counts = f"{facts['train_tokens']} tokens to train on, {facts['heldout_tokens']} held out"
    return "; ".join([f"{name}: {line}" for name, line in facts["text"].items()] + [counts])

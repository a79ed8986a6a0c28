"""Text to packed tokens: which text goes to which split, and where the sequences of a split lie among its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from puzzle_ray.data.blocks import Block, FlatTokens, ShardFacts, Shards, Text, do_block, tokenise_block
from puzzle_ray.data.documents import TextFacts, cut
from puzzle_ray.data.mixture import SourceRead
from puzzle_ray.data.order import TokenArray, Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.errors import DataError

SPLITS = ("train", "heldout")


def pack(texts: Iterable[str], tokenizer: Any, length: int, max_tokens: int) -> TokenArray:
    """Documents joined by the tokenizer's separator and cut into `[sequences, length]`; a rest shorter than `length` is dropped.

    All of it in memory. Raises DataError.
    """
    block = Block(0, [("all", piece) for text in texts for piece in cut([text])], [])
    return _sequences([tokenise_block(block, {"all": max_tokens}, tokenizer)["all"].tokens], length)


def _sequences(flat: Sequence[FlatTokens], length: int) -> TokenArray:
    joined = np.concatenate(flat)
    count = len(joined) // length
    return joined[: count * length].reshape(count, length)


@dataclass
class Streamed:
    """What became of a text, block by block in order: tokens of every shard, and of every source (documents, tokens) by split.

    `told` hears of the characters of each block.
    """

    text: Text
    told: Callable[[int], object]
    counts: dict[str, list[int]] = field(init=False)
    by_source: dict[str, dict[int, tuple[int, int]]] = field(init=False)
    read: Sequence[SourceRead] = ()

    def __post_init__(self) -> None:
        self.counts = {split: [] for split in self.text.limits}
        self.by_source = {split: {} for split in self.text.limits}

    @property
    def num_blocks(self) -> int:
        return min(len(counts) for counts in self.counts.values())

    @property
    def room(self) -> dict[str, int]:
        """How many tokens every split may still have."""
        return {split: limit - sum(self.counts[split]) for split, limit in self.text.limits.items()}

    @property
    def full(self) -> bool:
        return not any(self.room.values())

    def add(self, read: Sequence[SourceRead], found: Mapping[str, ShardFacts]) -> bool:
        """The next block. Returns False, and adds nothing, where it was given more room than there is and took it."""
        room = self.room
        if any(facts.tokens > room[split] for split, facts in found.items()):
            return False
        self.read = read
        for split, facts in found.items():
            self.counts[split].append(facts.tokens)
            for source, documents, tokens in facts.by_source:
                before = self.by_source[split].get(source, (0, 0))
                self.by_source[split][source] = before[0] + documents, before[1] + tokens
        self.told(max(facts.characters for facts in found.values()))
        return True


class Tokeniser(Protocol):
    """Who reads text and writes shards: this process (`Here`), or others."""

    def has_few_documents(self, text: Text) -> bool: ...

    def stream(self, text: Text) -> Streamed:
        """Writes the shards of a text until its splits have what they may have. Blocks whose shards are there are passed by."""


@dataclass(frozen=True)
class Here:
    """This process, one block after the other."""

    shards: Shards
    tokenizer: Any
    told: Callable[[int], object] = lambda characters: None

    def has_few_documents(self, text: Text) -> bool:
        return text.has_few_documents(self.tokenizer)

    def stream(self, text: Text) -> Streamed:
        done = Streamed(text, self.told)
        for block in text.blocks(self.tokenizer):
            done.add(block.read, do_block(self.shards, block, done.room, self.tokenizer))
            if done.full:
                break
        return done


@dataclass(frozen=True)
class Split:
    """Sequences `rows[0]` to `rows[1]` of the tokens of a run of shards; `tokens` has their number in each."""

    shards: str
    tokens: tuple[int, ...]
    rows: tuple[int, int]

    @property
    def num_sequences(self) -> int:
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True)
class SourceFacts:
    """What was taken of one source of `name`, which is train or heldout. `where` is what errors call it."""

    name: str
    where: str
    source: str
    weight: float
    text: TextFacts
    times_read: int  # to its end
    tokens: Mapping[str, int]  # by the shards that they are in
    share: float  # of the tokens of all sources of `name`

    def line(self, totals: Mapping[str, int] | None = None) -> str:
        """`300 documents, 200 rows without text dropped`; of a mixture, with its tokens and their share of `totals`, by split.

        So a source is seen that nothing is trained on, or held out, of.
        """
        if totals is None:
            return self.text.line()
        use = {"train": " to train on", "heldout": " held out"} if len(self.tokens) > 1 else {}
        taken = [f"{n} tokens{use.get(split, '')} ({n / max(1, totals[split]):.1%})" for split, n in self.tokens.items()]
        times = {0: "its end not reached", 1: "its end reached"}.get(self.times_read, f"read {self.times_read} times")
        return ", ".join([repr(self.source), self.text.line(), *taken, times])

    def to_json(self) -> dict[str, Any]:
        """For a record: one level, but for the tokens."""
        found = asdict(self)
        text = found.pop("text")
        return found | text


@dataclass(frozen=True)
class Tokenised:
    splits: Mapping[str, Split]
    sources: tuple[SourceFacts, ...]


def tokenise(
    config: DataConfig, tokenizer: Any, max_positions: int | None, facts: dict[str, TextFacts] | None = None
) -> tuple[Tokens, Tokens]:
    """(train, held-out) in memory; see `tokenise_into`. `facts` is told what was read of every source."""
    shards = InMemory()
    done = tokenise_into(Here(shards, tokenizer), config, max_positions)
    if facts is not None:
        facts.update({source.where.removeprefix("data."): source.text for source in done.sources})
    length, whole = config.sequence_length, {}
    for split in done.splits.values():
        if split.shards not in whole:
            whole[split.shards] = _sequences(shards.found[split.shards], length)
    train, heldout = (whole[done.splits[name].shards][slice(*done.splits[name].rows)] for name in SPLITS)
    return Tokens(train), Tokens(heldout)


class InMemory:
    """Shards that are kept."""

    def __init__(self) -> None:
        self.found: dict[str, list[FlatTokens]] = {}

    def write(self, split: str, number: int, tokens: FlatTokens, facts: ShardFacts) -> None:
        self.found.setdefault(split, []).append(tokens)

    def read(self, split: str, number: int) -> None:
        return None


def tokenise_into(tokeniser: Tokeniser, config: DataConfig, max_positions: int | None) -> Tokenised:
    """Train and held-out text as token shards, block by block of the text.

    Without `heldout`, every document whose hash says so is held out; of fewer than 1000 documents, or where hardly any two differ so
    that the hash holds none out, the packed sequences at the end are. Not so of a mixture that repeats its sources: at its end are
    documents that were trained on before. Raises DataError, also where the hash leaves nothing on one side of such a mixture.
    """
    length = config.sequence_length
    if max_positions is not None and length > max_positions:
        raise DataError("data.sequence_length", f"{length} is longer than the parent's {max_positions} positions", "shorten it")
    if config.train is None:
        raise DataError("data.train", "no training text is named", "set data.train to a file, a folder, a URL or a hub id")
    limits = dict(zip(SPLITS, (config.max_train_tokens, config.max_heldout_tokens), strict=True))
    if config.heldout is not None:
        streams = [tokeniser.stream(Text.of(config, name, {name: limits[name]})) for name in SPLITS]
        splits = {name: _from_start(stream, name, length) for name, stream in zip(SPLITS, streams, strict=True)}
    else:
        by_hash = Text.of(config, "train", limits, bounded=True)
        repeats = len(config.sources("train")) > 1 and config.source_end == "repeat"
        streams = [] if not repeats and tokeniser.has_few_documents(by_hash) else [tokeniser.stream(by_hash)]
        splits = {name: _from_start(streams[0], name, length) for name in SPLITS if streams}
        counts = [split.num_sequences for split in splits.values()]
        if repeats and any(counts) and not all(counts):
            raise _too_few_to_repeat(config, splits)
        if not streams or any(counts) and not all(counts):
            streams = [tokeniser.stream(Text.of(config, "train", {"all": sum(limits.values())}))]
            splits = _end_held_out(config, streams[0].counts["all"])
    for name, split in splits.items():
        if not split.num_sequences:
            raise DataError(
                f"data.{name}", f"not even one sequence of {length} tokens", "give more text or shorten data.sequence_length"
            )
    return Tokenised(splits, tuple(facts for stream in streams for facts in _source_facts(stream)))


def _from_start(stream: Streamed, name: str, length: int) -> Split:
    tokens = tuple(stream.counts[name])
    return Split(name, tokens, (0, sum(tokens) // length))


def _too_few_to_repeat(config: DataConfig, splits: Mapping[str, Split]) -> DataError:
    use = {"train": "to train on", "heldout": "held out"}
    tokens = " and ".join(f"{sum(split.tokens)} tokens {use[name]}" for name, split in splits.items())
    problem = (
        f"with data.source_end=repeat the hash of a document says whether it is held out; of these few that leaves {tokens}, "
        f"and a sequence has {config.sequence_length}"
    )
    return DataError("data.heldout", problem, "name other text as data.heldout")


def _end_held_out(config: DataConfig, tokens: Sequence[int]) -> dict[str, Split]:
    """Both splits as parts of the same shards: the end is held out."""
    length = config.sequence_length
    total = sum(tokens) // length
    held = min(max(1, round(total * config.heldout_fraction)), max(1, config.max_heldout_tokens // length))
    cut_at = max(0, total - held)
    train = (0, min(cut_at, config.max_train_tokens // length))
    return {"train": Split("all", tuple(tokens), train), "heldout": Split("all", tuple(tokens), (cut_at, total))}


def _source_facts(stream: Streamed) -> list[SourceFacts]:
    config, name = stream.text.config, stream.text.name
    whole = sum(sum(counts) for counts in stream.counts.values())
    found = []
    for number, (source, read) in enumerate(zip(config.sources(name), stream.read, strict=True)):
        taken = {split: by_source.get(number, (0, 0)) for split, by_source in stream.by_source.items()}
        text = TextFacts(sum(documents for documents, _ in taken.values()), read.facts.dropped_rows, read.facts.left_out)
        tokens = {split: count for split, (_, count) in taken.items()}
        share = sum(tokens.values()) / max(1, whole)
        where = config.where(name, number)
        found.append(SourceFacts(name, where, source.source, source.weight, text, read.times, tokens, share))
    return found

"""Text in blocks. A block becomes one shard of every split, whoever tokenises it, and in whatever order blocks are done.

A block ends with the piece that fills it, so that blocks follow from the text alone. What a block depends on beside its text is how many
tokens its splits may still have, and that matters only where a limit is reached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from puzzle_ray.data.documents import Piece
from puzzle_ray.data.files import find_files
from puzzle_ray.data.foreign import reason_of
from puzzle_ray.data.mixture import SourceRead, mixed
from puzzle_ray.data.packing import separator_of
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.errors import DataError

BLOCK_CHARACTERS = 16_000_000  # about 4 million tokens
FEW_DOCUMENTS = 1000
MOST_CHARACTERS_PER_TOKEN = 16
_TEXTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1_000_000
_CHARACTERS_PER_TOKEN = 4  # a guess: it decides how much is tokenised beyond the limit, never the result

FlatTokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Block:
    """Consecutive pieces of a text, each with the split it goes to, and how far every source was read by its end."""

    number: int
    pieces: Sequence[tuple[str, Piece]]
    read: Sequence[SourceRead]

    @property
    def characters(self) -> int:
        return sum(len(piece.text) for _, piece in self.pieces)


@dataclass(frozen=True)
class Text:
    """Text that is tokenised in one go: `train` or `heldout` of the settings, and the most tokens of every split that it goes to.

    Where there are two splits, the hash of a document says which it goes to (of one longer than a million characters, the hash of its
    beginning).
    """

    config: DataConfig
    name: str
    limits: Mapping[str, int]
    most_characters: int | None = None  # whole documents, but of the last one, where it is long, a part
    block_characters: int = BLOCK_CHARACTERS

    @classmethod
    def of(cls, config: DataConfig, name: str, limits: Mapping[str, int], bounded: bool = False) -> Text:
        """`bounded`: so much text at the most as there may be for the limits, whatever splits it goes to."""
        most = MOST_CHARACTERS_PER_TOKEN * sum(limits.values())
        return cls(config, name, limits, most if bounded else None, min(BLOCK_CHARACTERS, most))

    def pieces(self, tokenizer: Any, read: list[SourceRead]) -> Iterator[Piece]:
        found = mixed(self.config, self.name, tokenizer, read)
        return found if self.most_characters is None else _up_to(found, self.most_characters)

    def blocks(self, tokenizer: Any, told: Callable[[], object] = lambda: None) -> Iterator[Block]:
        """All blocks, one after the other; at least one, which may be empty. `told` hears of every piece that was read."""
        read = self._unread()
        splits = list(self.limits)
        route = _by_hash(self.config.heldout_fraction) if len(splits) > 1 else None
        number, characters = 0, 0
        held: list[tuple[str, Piece]] = []
        for piece in self.pieces(tokenizer, read):
            told()
            held.append((route(piece) if route else splits[0], piece))
            characters += len(piece.text)
            if characters >= self.block_characters:
                yield Block(number, held, deepcopy(read))
                number, characters, held = number + 1, 0, []
        if held or not number:
            yield Block(number, held, deepcopy(read))

    def has_few_documents(self, tokenizer: Any, told: Callable[[], object] = lambda: None) -> bool:
        """Whether there are fewer than 1000. Few files of text have one each; else text is read up to the thousandth, or its end.

        Not for a mixture that repeats its sources, whose documents are not all different. `told` hears of every piece that was read.
        """
        sources = self.config.sources(self.name)
        files = [find_files(source.source, self.config.where(self.name, n)) for n, source in enumerate(sources)]
        if all(f.format == "text" for f in files) and sum(len(f.files) for f in files) < FEW_DOCUMENTS:
            return True
        found = 0
        for piece in self.pieces(tokenizer, self._unread()):
            told()
            found += piece.begins
            if found >= FEW_DOCUMENTS:
                return False
        return True

    def _unread(self) -> list[SourceRead]:
        return [SourceRead() for _ in self.config.sources(self.name)]


@dataclass(frozen=True)
class ShardFacts:
    """What is known of a shard beside its tokens: the characters of its block, and (source, documents, tokens) of every source in it."""

    characters: int
    tokens: int
    by_source: tuple[tuple[int, int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> ShardFacts | None:
        """None for a shard of another version."""
        if known.keys() != cls.__dataclass_fields__.keys():
            return None
        by_source = tuple((int(source), int(documents), int(tokens)) for source, documents, tokens in known["by_source"])
        return cls(int(known["characters"]), int(known["tokens"]), by_source)


class Shards(Protocol):
    """Where token shards go."""

    def write(self, split: str, number: int, tokens: FlatTokens, facts: ShardFacts) -> None: ...

    def read(self, split: str, number: int) -> ShardFacts | None:
        """Of a shard that an interrupted run has left."""


def do_block(shards: Shards, block: Block, room: Mapping[str, int], tokenizer: Any) -> dict[str, ShardFacts]:
    """Writes the shards of a block, unless they are there. `room`: how many tokens each split takes at the most."""
    there = {split: shards.read(split, block.number) for split in room}
    characters = block.characters
    known = {s: facts for s, facts in there.items() if facts and facts.characters == characters and facts.tokens <= room[s]}
    if len(known) == len(room):
        return known
    found = {}
    for split, taken in tokenise_block(block, room, tokenizer).items():
        tokens = taken.tokens
        by_source = tuple((source, *taken.counts[source]) for source in sorted(taken.counts))
        found[split] = ShardFacts(characters, len(tokens), by_source)
        shards.write(split, block.number, tokens, found[split])
    return found


@dataclass
class Taken:
    """The tokens of one split in one block, up to `room` of them."""

    room: int
    found: list[FlatTokens] = field(default_factory=list)
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)  # source -> (documents, tokens)

    def add(self, piece: Piece, ids: list[int]) -> None:
        taken = np.asarray(ids[: self.room], dtype=np.int32)
        self.room -= len(taken)
        self.found.append(taken)
        if len(taken):
            documents, tokens = self.counts.get(piece.source, (0, 0))
            self.counts[piece.source] = documents + piece.begins, tokens + len(taken)

    @property
    def tokens(self) -> FlatTokens:
        return np.concatenate(self.found) if self.found else np.zeros(0, dtype=np.int32)


def tokenise_block(block: Block, room: Mapping[str, int], tokenizer: Any) -> dict[str, Taken]:
    """The tokens of a block by split: documents one after the other, each behind the tokenizer's separator. Raises DataError.

    It tokenises now and then, a batch at a time, and not much more than there is room for.
    """
    separator = separator_of(tokenizer)
    found = {split: Taken(tokens) for split, tokens in room.items()}
    batch: list[tuple[str, Piece]] = []
    size = 0

    def flush() -> None:
        for (split, piece), ids in zip(batch, token_ids([p.text for _, p in batch], tokenizer), strict=True):
            begins = [separator] if piece.begins and separator is not None else []
            found[split].add(piece, begins + ids)
        batch.clear()

    for split, piece in block.pieces:
        if not found[split].room:
            continue
        batch.append((split, piece))
        size += len(piece.text)
        left = sum(taken.room for taken in found.values())
        if len(batch) >= _TEXTS_AT_ONCE or size > min(_CHARACTERS_AT_ONCE, _CHARACTERS_PER_TOKEN * left):
            flush()
            size = 0
    flush()
    return found


def token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Of every text, without special tokens. Raises DataError where the tokenizer fails."""
    if not texts:
        return []
    only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
    try:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False, **only_ids)["input_ids"])
    except Exception as error:  # a tokenizer is a library of its own, in another language
        problem = f"the parent's tokenizer cannot read the text ({reason_of(error)})"
        raise DataError("data", problem, "try the parent's tokenizer on the text") from None


def _up_to(text: Iterable[Piece], most_characters: int) -> Iterator[Piece]:
    size = of_document = 0
    for piece in text:
        if piece.begins:
            if size >= most_characters:
                return
            of_document = 0
        yield piece
        size += len(piece.text)
        of_document += 1
        if size >= most_characters and of_document > 1:
            return


def _by_hash(fraction: float) -> Callable[[Piece], str]:
    """A function that says of every piece, in order, whether its document trains or is held out."""
    current = "train"

    def route(piece: Piece) -> str:
        nonlocal current
        if piece.begins:
            digest = hashlib.sha256(piece.text.encode()).digest()
            current = "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < fraction else "train"
        return current

    return route

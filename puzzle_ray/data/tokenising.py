"""Text to token batches: read, tokenise, pack, and an order that is a pure function of (seed, number)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from puzzle_ray.data.documents import Piece, TextFacts, cut, pieces
from puzzle_ray.data.foreign import reason_of
from puzzle_ray.data.order import TokenArray, Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.errors import DataError

SPLITS = ("train", "heldout")
FEW_DOCUMENTS = 1000
BLOCK_CHARACTERS = 16_000_000  # of text that becomes one shard, about 4 million tokens
_TEXTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1_000_000
_CHARACTERS_PER_TOKEN = 4  # a guess: it decides how much is tokenised beyond the limit, never the result


def pack(texts: Iterable[str], tokenizer: Any, length: int, max_tokens: int) -> TokenArray:
    """Documents joined by the tokenizer's separator and cut into `[sequences, length]`; a rest shorter than `length` is dropped."""
    return pack_pieces((piece for text in texts for piece in cut([text])), tokenizer, length, max_tokens)


def pack_pieces(texts: Iterable[Piece], tokenizer: Any, length: int, max_tokens: int) -> TokenArray:
    """As `pack`, for documents in pieces. Reads on, tokenises and holds about as much as `max_tokens` need. Raises DataError."""
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found: list[npt.NDArray[np.int32]] = []
    total = size = 0
    batch: list[Piece] = []

    def flush() -> None:
        nonlocal total, size
        for piece, ids in zip(batch, _token_ids([p.text for p in batch], tokenizer), strict=True):
            begins = [separator] if piece.begins and separator is not None else []
            found.append(np.asarray(begins + ids, dtype=np.int32))
            total += len(found[-1])
        batch.clear()
        size = 0

    for piece in texts:
        batch.append(piece)
        size += len(piece.text)
        enough = min(_CHARACTERS_AT_ONCE, _CHARACTERS_PER_TOKEN * (max_tokens - total))
        if len(batch) >= _TEXTS_AT_ONCE or size > enough:
            flush()
        if total >= max_tokens:
            break
    flush()
    joined = np.concatenate(found)[:max_tokens] if found else np.zeros(0, dtype=np.int32)
    count = len(joined) // length
    return joined[: count * length].reshape(count, length)


def _token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    try:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # a tokenizer is a library of its own, in another language
        problem = f"the parent's tokenizer cannot read the text ({reason_of(error)})"
        raise DataError("data", problem, "try the parent's tokenizer on the text") from None


def tokenise(
    config: DataConfig, tokenizer: Any, max_positions: int | None, facts: dict[str, TextFacts] | None = None
) -> tuple[Tokens, Tokens]:
    """(train, held-out) in memory; see `tokenise_into`."""
    shards = InMemory()
    splits = tokenise_into(shards, config, tokenizer, max_positions, facts)
    whole = {split.shards: shards.whole(split.shards) for split in splits.values()}
    train, heldout = (whole[splits[name].shards][slice(*splits[name].rows)] for name in SPLITS)
    return Tokens(train), Tokens(heldout)


class Shards(Protocol):
    """Where token shards go, and from where an interrupted run takes up what is left over behind the last one."""

    def write(self, split: str, number: int, sequences: TokenArray, behind: Mapping[str, Any]) -> None: ...

    def read(self, split: str, number: int) -> tuple[int, Mapping[str, Any]] | None:
        """(how many sequences, what was left over behind them) of a shard that is there."""


class InMemory:
    """Shards that are kept."""

    def __init__(self) -> None:
        self.found: dict[str, list[TokenArray]] = {}

    def write(self, split: str, number: int, sequences: TokenArray, behind: Mapping[str, Any]) -> None:
        self.found.setdefault(split, []).append(sequences)

    def read(self, split: str, number: int) -> None:
        return None

    def whole(self, split: str) -> TokenArray:
        return np.concatenate(self.found[split])


@dataclass(frozen=True)
class Split:
    """Rows of a run of shards: `counts` has the number of sequences of each."""

    shards: str
    counts: tuple[int, ...]
    rows: tuple[int, int]

    @property
    def num_sequences(self) -> int:
        return self.rows[1] - self.rows[0]


def tokenise_into(
    shards: Shards,
    config: DataConfig,
    tokenizer: Any,
    max_positions: int | None,
    facts: dict[str, TextFacts] | None = None,
) -> dict[str, Split]:
    """Train and held-out text as token shards, block by block of the text: nothing else of it is in memory.

    Without `heldout`, every document whose hash says so is held out (of one longer than a million characters, the hash of its
    beginning); of fewer than 1000 documents, or where hardly any two differ so that the hash holds none out, the packed sequences at the
    end are. `facts` is told what was read and what was not, under `train` and, where it has a source of its own, `heldout`. Raises
    DataError.
    """
    length = config.sequence_length
    if max_positions is not None and length > max_positions:
        raise DataError("data.sequence_length", f"{length} is longer than the parent's {max_positions} positions", "shorten it")
    if config.train is None:
        raise DataError("data.train", "no training text is named", "set data.train to a file, a folder, a URL or a hub id")
    facts = {} if facts is None else facts
    source = config.train

    def read(name: str, source: str) -> Iterator[Piece]:
        facts[name] = TextFacts()
        return pieces(source, config, f"data.{name}", tokenizer, facts[name])

    def end_held_out() -> dict[str, Split]:
        both = {"all": sum(limits.values())}
        return _end_held_out(
            config, _stream(shards, read("train", source), both, partial(_always, "all"), tokenizer, length)["all"].counts
        )

    limits = dict(zip(SPLITS, (config.max_train_tokens, config.max_heldout_tokens), strict=True))
    if config.heldout is not None:
        found: dict[str, Split] = {}
        for name, origin in (("train", source), ("heldout", config.heldout)):
            found |= _stream(shards, read(name, origin), {name: limits[name]}, partial(_always, name), tokenizer, length)
    else:
        most = 16 * sum(limits.values())  # at most 16 characters a token
        if _has_few_documents(pieces(source, config, "data.train", tokenizer), most):
            found = end_held_out()
        else:
            route = _by_hash(config.heldout_fraction)
            found = _stream(shards, _up_to(read("train", source), most), limits, route, tokenizer, length)
            counts = [split.num_sequences for split in found.values()]
            if any(counts) and not all(counts):
                found = end_held_out()
    for name, split in found.items():
        if not split.num_sequences:
            raise DataError(
                f"data.{name}", f"not even one sequence of {length} tokens", "give more text or shorten data.sequence_length"
            )
    return found


@dataclass
class _Packer:
    """Packs the tokens of one split, up to `limit` of them."""

    length: int
    limit: int
    total: int = 0  # tokens so far
    counts: list[int] = field(default_factory=list)  # sequences of every block
    rest: TokenArray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    found: list[TokenArray] = field(default_factory=list)  # since the last block

    @property
    def full(self) -> bool:
        return self.total >= self.limit

    def add(self, ids: TokenArray) -> None:
        self.found.append(ids[: self.limit - self.total])
        self.total += len(ids)

    def cut(self) -> TokenArray:
        """The sequences that are complete; what is left over begins the next block."""
        joined = np.concatenate([self.rest, *self.found])
        whole = len(joined) // self.length
        self.rest, self.found = joined[whole * self.length :], []
        self.counts.append(whole)
        return joined[: whole * self.length].reshape(whole, self.length)


class _Blocks:
    """Blocks of a text on their way to the shards of one or more splits."""

    def __init__(self, shards: Shards, limits: Mapping[str, int], tokenizer: Any, length: int) -> None:
        self.shards, self.tokenizer = shards, tokenizer
        self.separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.packers = {name: _Packer(length, limit) for name, limit in limits.items()}
        self.batch: list[tuple[str, Piece]] = []
        self.characters = 0  # of the batch

    @property
    def full(self) -> bool:
        return all(packer.full for packer in self.packers.values())

    def add(self, name: str, piece: Piece) -> None:
        """Tokenises now and then, a batch at a time, and not much more than is still needed."""
        if self.packers[name].full:
            return
        self.batch.append((name, piece))
        self.characters += len(piece.text)
        left = sum(max(0, packer.limit - packer.total) for packer in self.packers.values())
        if len(self.batch) >= _TEXTS_AT_ONCE or self.characters > min(_CHARACTERS_AT_ONCE, _CHARACTERS_PER_TOKEN * left):
            self._flush()

    def _flush(self) -> None:
        found = _token_ids([piece.text for _, piece in self.batch], self.tokenizer)
        for (name, piece), ids in zip(self.batch, found, strict=True):
            begins = [self.separator] if piece.begins and self.separator is not None else []
            if not self.packers[name].full:
                self.packers[name].add(np.asarray(begins + ids, dtype=np.int32))
        self.batch, self.characters = [], 0

    def end(self, number: int, characters: int) -> None:
        """Writes the shards of a block of so many characters."""
        self._flush()
        for name, packer in self.packers.items():
            sequences = packer.cut()
            behind = {"rest": packer.rest.tolist(), "total": packer.total, "characters": characters}
            self.shards.write(name, number, sequences, behind)

    def take_up(self, number: int) -> int:
        """How many characters a block has whose shards are all there; goes on from what is behind them. 0 where one is missing."""
        found = {name: shard for name in self.packers if (shard := self.shards.read(name, number)) is not None}
        if len(found) < len(self.packers):
            return 0
        for name, (count, behind) in found.items():
            packer = self.packers[name]
            packer.counts.append(count)
            packer.rest, packer.total = np.asarray(behind["rest"], dtype=np.int32), int(behind["total"])
        return max(int(behind["characters"]) for _, behind in found.values())


def _stream(
    shards: Shards, text: Iterator[Piece], limits: Mapping[str, int], route: Callable[[Piece], str], tokenizer: Any, length: int
) -> dict[str, Split]:
    """Tokenises a text block by block into one or more splits, until all have what they may have. Blocks that are there are passed by."""
    blocks = _Blocks(shards, limits, tokenizer, length)
    number = characters = 0
    passed_by = blocks.take_up(0)
    for piece in text:
        characters += len(piece.text)
        name = route(piece)
        if not passed_by:
            blocks.add(name, piece)
        if characters >= (passed_by or BLOCK_CHARACTERS):
            if not passed_by:
                blocks.end(number, characters)
            number, characters = number + 1, 0
            passed_by = blocks.take_up(number)
        if not passed_by and blocks.full:
            break
    if not passed_by and (characters or not number):
        blocks.end(number, characters)
    splits = {}
    for name, packer in blocks.packers.items():
        end = min(sum(packer.counts), packer.limit // length)
        splits[name] = Split(name, tuple(packer.counts), (0, end))
    return splits


def _has_few_documents(text: Iterator[Piece], most_characters: int) -> bool:
    """Whether a text has fewer than 1000 documents. It is read up to the thousandth, or so many characters."""
    found = sum(1 for piece in _up_to(text, most_characters) if piece.begins)
    return found < FEW_DOCUMENTS


def _up_to(text: Iterator[Piece], most_characters: int) -> Iterator[Piece]:
    """A text up to so many characters: whole documents, but of the last one, where it is long, a part."""
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


def _always(name: str, piece: Piece) -> str:
    return name


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


def _end_held_out(config: DataConfig, counts: tuple[int, ...]) -> dict[str, Split]:
    """Both splits as parts of the same shards: the end is held out."""
    length, total = config.sequence_length, sum(counts)
    total = min(total, (config.max_train_tokens + config.max_heldout_tokens) // length)
    held = min(max(1, round(total * config.heldout_fraction)), max(1, config.max_heldout_tokens // length))
    cut_at = max(0, total - held)
    train = (0, min(cut_at, config.max_train_tokens // length))
    return {"train": Split("all", counts, train), "heldout": Split("all", counts, (cut_at, total))}

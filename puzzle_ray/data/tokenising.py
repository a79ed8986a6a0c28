"""Text to token batches: read, tokenise, pack, and an order that is a pure function of (seed, number)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_ray.data.documents import Piece, TextFacts, cut, pieces
from puzzle_ray.data.foreign import reason_of
from puzzle_ray.data.order import TokenArray, Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.errors import DataError

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
    """(train, held-out). Without `heldout`, every document whose hash says so is held out.

    `facts` is told what was read and what was not, under `train` and, where it has a source of its own, `heldout`. Raises DataError.
    """
    length = config.sequence_length
    if max_positions is not None and length > max_positions:
        raise DataError("data.sequence_length", f"{length} is longer than the parent's {max_positions} positions", "shorten it")
    if config.train is None:
        raise DataError("data.train", "no training text is named", "set data.train to a file, a folder, a URL or a hub id")
    facts = {} if facts is None else facts

    def read(name: str, source: str) -> Iterator[Piece]:
        return pieces(source, config, f"data.{name}", tokenizer, facts.setdefault(name, TextFacts()))

    if config.heldout is not None:
        train = pack_pieces(read("train", config.train), tokenizer, length, config.max_train_tokens)
        heldout = pack_pieces(read("heldout", config.heldout), tokenizer, length, config.max_heldout_tokens)
    else:
        train, heldout = _split(config, read("train", config.train), tokenizer)
    for name, packed in (("train", train), ("heldout", heldout)):
        if not len(packed):
            raise DataError(
                f"data.{name}", f"not even one sequence of {length} tokens", "give more text or shorten data.sequence_length"
            )
    return Tokens(train), Tokens(heldout)


_FEW_DOCUMENTS = 1000


def _split(config: DataConfig, texts: Iterator[Piece], tokenizer: Any) -> tuple[TokenArray, TokenArray]:
    """Splits by document, by a hash of its text; fewer than 1000 documents by packed sequences instead, the end held out.

    Reads no more documents than the limits on tokens can need (at most 16 characters a token).
    """
    most = 16 * (config.max_train_tokens + config.max_heldout_tokens)
    found: list[list[Piece]] = []
    size = 0
    for piece in texts:
        if piece.begins:
            if size >= most:
                break
            found.append([])
        found[-1].append(piece)
        size += len(piece.text)
        if size >= most and len(found[-1]) > 1:
            break
    length = config.sequence_length
    if len(found) < _FEW_DOCUMENTS:
        whole = (piece for document in found for piece in document)
        packed = pack_pieces(whole, tokenizer, length, config.max_train_tokens + config.max_heldout_tokens)
        held = min(max(1, round(len(packed) * config.heldout_fraction)), max(1, config.max_heldout_tokens // length))
        cut_at = len(packed) - held
        return packed[:cut_at][: config.max_train_tokens // length], packed[cut_at:]

    def part(is_heldout: bool) -> Iterator[Piece]:
        chosen = (document for document in found if _is_heldout(document, config.heldout_fraction) == is_heldout)
        return (piece for document in chosen for piece in document)

    train = pack_pieces(part(False), tokenizer, length, config.max_train_tokens)
    heldout = pack_pieces(part(True), tokenizer, length, config.max_heldout_tokens)
    return train, heldout


def _is_heldout(document: list[Piece], fraction: float) -> bool:
    digest = hashlib.sha256()
    for piece in document:
        digest.update(piece.text.encode())
    return int.from_bytes(digest.digest()[:8], "big") / 2**64 < fraction

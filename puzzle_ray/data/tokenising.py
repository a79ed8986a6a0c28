"""Text to token batches: read, tokenise, pack, and an order that is a pure function of (seed, number)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_ray.data.order import TokenArray, Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.sources import documents
from puzzle_ray.errors import DataError


def pack(texts: Iterator[str], tokenizer: Any, length: int, max_tokens: int) -> TokenArray:
    """Documents joined by the tokenizer's separator and cut into `[sequences, length]`; a rest shorter than `length` is dropped."""
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    pieces: list[npt.NDArray[np.int32]] = []
    total = 0
    batch: list[str] = []

    def flush() -> None:
        nonlocal total
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] if batch else []:
            piece = np.asarray(([separator] if separator is not None else []) + ids, dtype=np.int32)
            pieces.append(piece)
            total += len(piece)
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) >= 256 or sum(map(len, batch)) > 4_000_000:
            flush()
        if total >= max_tokens:
            break
    flush()
    joined = np.concatenate(pieces)[:max_tokens] if pieces else np.zeros(0, dtype=np.int32)
    count = len(joined) // length
    return joined[: count * length].reshape(count, length)


def tokenise(config: DataConfig, tokenizer: Any, max_positions: int | None) -> tuple[Tokens, Tokens]:
    """(train, held-out). Without `heldout`, every document whose hash says so is held out. Raises DataError."""
    length = config.sequence_length
    if max_positions is not None and length > max_positions:
        raise DataError("data.sequence_length", f"{length} is longer than the parent's {max_positions} positions", "shorten it")
    if config.train is None:
        raise DataError("data.train", "no training text is named", "set data.train to a file, a folder, a URL or a hub id")
    if config.heldout is not None:
        train = pack(documents(config.train, config, "data.train"), tokenizer, length, config.max_train_tokens)
        heldout = pack(documents(config.heldout, config, "data.heldout"), tokenizer, length, config.max_heldout_tokens)
    else:
        train, heldout = _split(config, tokenizer)
    for name, packed in (("train", train), ("heldout", heldout)):
        if not len(packed):
            raise DataError(
                f"data.{name}", f"not even one sequence of {length} tokens", "give more text or shorten data.sequence_length"
            )
    return Tokens(train), Tokens(heldout)


_FEW_DOCUMENTS = 1000


def _split(config: DataConfig, tokenizer: Any) -> tuple[TokenArray, TokenArray]:
    """Splits by document, by a hash of its text; fewer than 1000 documents by packed sequences instead, the end held out.

    Reads no more documents than the limits on tokens can need (at most 16 characters a token).
    """
    assert config.train is not None
    most = 16 * (config.max_train_tokens + config.max_heldout_tokens)
    texts: list[str] = []
    size = 0
    for text in documents(config.train, config, "data.train"):
        texts.append(text)
        size += len(text)
        if size >= most:
            break
    length = config.sequence_length
    if len(texts) < _FEW_DOCUMENTS:
        packed = pack(iter(texts), tokenizer, length, config.max_train_tokens + config.max_heldout_tokens)
        held = min(max(1, round(len(packed) * config.heldout_fraction)), max(1, config.max_heldout_tokens // length))
        cut = len(packed) - held
        return packed[:cut][: config.max_train_tokens // length], packed[cut:]

    def is_heldout(text: str) -> bool:
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return number / 2**64 < config.heldout_fraction

    train = pack((t for t in texts if not is_heldout(t)), tokenizer, length, config.max_train_tokens)
    heldout = pack((t for t in texts if is_heldout(t)), tokenizer, length, config.max_heldout_tokens)
    return train, heldout

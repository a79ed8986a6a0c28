"""Text to token batches: read, tokenise, pack, and an order that is a pure function of (seed, number)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from puzzle_ray.config import DataConfig
from puzzle_ray.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

TokenArray = npt.NDArray[np.int32]
_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Tokens:
    """Packed sequences `[sequences, sequence_length]` of one split."""

    sequences: TokenArray

    @property
    def num_tokens(self) -> int:
        return int(self.sequences.size)

    def batch(self, seed: int, number: int, num_sequences: int) -> Tensor:
        """Micro-batch `number`: `[num_sequences, sequence_length]` int64. Every epoch has a permutation of its own."""
        import torch

        total = len(self.sequences)
        rows = []
        for position in range(number * num_sequences, (number + 1) * num_sequences):
            epoch, offset = divmod(position, total)
            rows.append(_permutation(seed, epoch, total)[offset])
        return torch.from_numpy(self.sequences[rows].astype(np.int64))

    def first(self, max_tokens: int, num_sequences: int) -> list[Tensor]:
        """The first sequences in order, for evaluation: batches of `num_sequences`, at least one, the last may be smaller."""
        import torch

        count = max(1, min(len(self.sequences), max_tokens // self.sequences.shape[1]))
        return [
            torch.from_numpy(self.sequences[i : min(i + num_sequences, count)].astype(np.int64))
            for i in range(0, count, num_sequences)
        ]


_permutations: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}


def _permutation(seed: int, epoch: int, total: int) -> npt.NDArray[np.int64]:
    key = (seed, epoch, total)
    if key not in _permutations:
        if len(_permutations) > 4:
            _permutations.clear()
        _permutations[key] = np.random.default_rng([seed, epoch, total]).permutation(total)
    return _permutations[key]


def _files(source: str) -> tuple[str, list[str]]:
    """(format, files) of a path, folder, glob or URL; an empty list means that it must be a hub id."""
    import fsspec

    if "://" in source:
        try:
            filesystem, path = fsspec.core.url_to_fs(source)
        except (ValueError, ImportError) as error:
            raise DataError("data", f"{source!r} cannot be opened ({error})", "name a file, a folder or an fsspec URL") from None
        protocol = source.split("://", 1)[0] + "://"
        found = sorted(filesystem.find(path)) if filesystem.isdir(path) else sorted(filesystem.glob(path))
        found = [protocol + name for name in found]
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(str(p) for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            found = [str(path)]
        else:
            found = sorted(str(p) for p in path.parent.glob(path.name)) if path.parent.is_dir() else []
    kept = [name for name in found if Path(name).suffix in _FORMATS]
    formats = {_FORMATS[Path(name).suffix] for name in kept}
    if len(formats) > 1:
        raise DataError("data", f"{source!r} mixes {', '.join(sorted(formats))} files", "name a glob of one kind")
    return (formats.pop() if formats else ""), kept


def check_source(source: str, where: str) -> None:
    """Cheap check before any work. Raises DataError for a path that does not exist or holds no text files, or is empty."""
    kind, files = _files(source)
    if files:
        if "://" not in source and all(Path(name).stat().st_size == 0 for name in files):
            raise DataError(where, f"{source!r} is empty", "name a file with text in it")
        return
    looks_like_path = (
        source.startswith((".", "/", "~")) or "://" in source or Path(source).suffix in _FORMATS or source.count("/") > 1
    )
    if looks_like_path or Path(source).exists():
        raise DataError(
            where, f"no .txt, .jsonl or .parquet file at {source!r}", "name a file, a folder, a glob, a URL or a hub id"
        )


def documents(source: str, config: DataConfig, where: str) -> Iterator[str]:
    """The documents of a source, in order. A .txt file is one document. Raises DataError."""
    kind, files = _files(source)
    if kind == "text":
        import fsspec

        for name in files:
            with fsspec.open(name, "r", encoding="utf-8", errors="replace") as file:
                yield file.read()
        return
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind:
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        else:
            check_source(source, where)
            rows = datasets.load_dataset(source, split=config.split, streaming=True)
        for row in rows:
            if config.text_column not in row:
                raise DataError(
                    f"{where}: {source!r}", f"no column {config.text_column!r}", f"data.text_column is one of {sorted(row)}"
                )
            if row[config.text_column]:
                yield row[config.text_column]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(where, f"{source!r} cannot be read ({reason})", "name a file, a folder, a URL or a hub id") from None


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


def source_fingerprint(source: str) -> str:
    """Changes when a local source's files do (name, size, time of change); a hub id or URL stands for itself."""
    _, files = _files(source)
    digest = hashlib.sha256(source.encode() if not files else b"")
    for name in files:
        path = Path(name)
        if "://" in name:
            digest.update(name.encode())
        else:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            if path.stat().st_size <= 64 << 20:
                digest.update(path.read_bytes())
            else:
                digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()

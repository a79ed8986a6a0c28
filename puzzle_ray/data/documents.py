"""The documents of a source, in order; long ones in pieces, so that time and memory follow what is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from puzzle_ray.data.columns import MISSING, columns_of, find, text_of, type_of
from puzzle_ray.data.files import Found, find_files
from puzzle_ray.data.foreign import reading
from puzzle_ray.data.formats import rows, text_chunks
from puzzle_ray.data.packing import SETTING, masked_by
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.sources import check_source, hub_commit, named_sources
from puzzle_ray.errors import DataError

WHOLE_CHARACTERS = 1_000_000  # a document up to this length is tokenised whole
PIECE_CHARACTERS = 1 << 16
_NEAR_CHARACTERS = 512  # how far before its end a place to cut a piece is looked for first
_FIRST_ROWS = 1000  # what the check before any work looks at
_FIRST_DOCUMENTS = 100
_CHARACTERS_LOOKED_AT = 10_000  # of each, in `check_separators`
_NAMES_SHOWN = 20
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_SPACE = re.compile(r"(?<=\S)\s")


class Piece(NamedTuple):
    """Text of a document; `begins` where a new document begins. `source` is the number of its source in a mixture."""

    text: str
    begins: bool
    source: int = 0


@dataclass
class TextFacts:
    """What was read of a source, and what was not."""

    documents: int = 0
    dropped_rows: int = 0  # without the text column, or with nothing in it
    left_out: list[str] = field(default_factory=list)  # files

    def line(self) -> str:
        """`300 documents, 200 rows without text dropped, 1 file left out (README.md)`."""
        said = [f"{self.documents} document{'s' * (self.documents != 1)}"]
        if self.dropped_rows:
            said.append(f"{self.dropped_rows} row{'s' * (self.dropped_rows != 1)} without text dropped")
        if self.left_out:
            names = [PurePosixPath(name).name for name in self.left_out[:3]] + ["..."] * (len(self.left_out) > 3)
            said.append(f"{len(self.left_out)} file{'s' * (len(self.left_out) != 1)} left out ({', '.join(names)})")
        return ", ".join(said)


def cut(chunks: Iterable[str]) -> Iterator[Piece]:
    """One document, given in chunks, as pieces that join to the same text.

    Up to `WHOLE_CHARACTERS` it is one piece. A longer one is cut before a space between two letters, where byte-level BPE, WordPiece
    and sentencepiece with a pre-tokeniser cut as well, so that the tokens are those of the whole document. They may differ by a token at a
    cut where a tokenizer puts a space before every text of its own, or where `PIECE_CHARACTERS` hold no such space.
    """
    text, parts, size, begins = "", [], 0, True
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if begins and size <= WHOLE_CHARACTERS or size <= 2 * PIECE_CHARACTERS:
            continue
        text, parts = "".join(parts), []
        start = 0
        while len(text) - start > 2 * PIECE_CHARACTERS:
            end = _place_to_cut(text, start)
            yield Piece(text[start:end], begins)
            start, begins = end, False
        parts, size = [text[start:]], len(text) - start
    rest = "".join(parts)
    if rest or begins:
        yield Piece(rest, begins)


def _place_to_cut(text: str, start: int) -> int:
    """The last good place in the second half of a piece; else the last white space there; else the piece's end."""
    middle, end = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
    for pattern in (_BETWEEN_WORDS, _SPACE):
        for begin in (max(middle, end - _NEAR_CHARACTERS), middle):
            places = [match.start() for match in pattern.finditer(text, begin, end)]
            if places:
                return places[-1]
    return end


def pieces(
    source: str,
    config: DataConfig,
    where: str,
    tokenizer: Any = None,
    facts: TextFacts | None = None,
    max_rows: int | None = None,
) -> Iterator[Piece]:
    """The documents of a source, in order. A text file is one document. `facts` counts while this is read. Raises DataError.

    `tokenizer` writes out chat messages. `max_rows`: how many rows are looked at.
    """
    facts = TextFacts() if facts is None else facts
    found = find_files(source, where)
    facts.left_out.extend(found.left_out)
    if found.format == "text":
        for file in found.files:
            facts.documents += 1
            yield from cut(text_chunks(file, where))
        return
    if not found.files:
        check_source(source, where)
    for text in _texts(_rows(source, found, config, where), source, config, where, tokenizer, facts, max_rows):
        facts.documents += 1
        yield from cut([text])


def documents(
    source: str, config: DataConfig, where: str, tokenizer: Any = None, facts: TextFacts | None = None
) -> Iterator[str]:
    """The documents of a source, in order, each of them whole. Raises DataError."""
    parts: list[str] = []
    for piece in pieces(source, config, where, tokenizer, facts):
        if piece.begins and parts:
            yield "".join(parts)
            parts = []
        parts.append(piece.text)
    if parts:
        yield "".join(parts)


def check_text(config: DataConfig, tokenizer: Any) -> None:
    """Looks at the first rows of all sources as tokenising would. Raises DataError for what holds no text."""
    for where, source in named_sources(config):
        check_source(source.source, where)
        if not find_files(source.source, where).files:
            hub_commit(source.source, where)  # streaming tries again and again before it says that the hub does not answer
        first = pieces(source.source, config.read_as(source), where, tokenizer, max_rows=_FIRST_ROWS)
        for _ in islice(first, _FIRST_DOCUMENTS):
            pass


def check_separators(config: DataConfig, tokenizer: Any) -> None:
    """Looks at the first documents of all sources. Raises DataError for one in which stands what documents begin with.

    `document_mask` would cut it there. So it is with chat messages whose template ends every turn by the tokenizer's end of text. At a
    document's very beginning it may stand once more.
    """
    separator = masked_by(tokenizer)
    for where, source in named_sources(config):
        first = pieces(source.source, config.read_as(source), where, tokenizer, max_rows=_FIRST_ROWS)
        for number, piece in enumerate(islice(first, _FIRST_DOCUMENTS), 1):
            ids = tokenizer(piece.text[:_CHARACTERS_LOOKED_AT], add_special_tokens=False, verbose=False)["input_ids"]
            if separator in ids[1:]:
                token = tokenizer.convert_ids_to_tokens(separator)
                problem = f"document {number} has {token!r} in it, where another would begin: its parts would not see each other"
                raise DataError(
                    f"{where}: {source.source!r}", problem, f"write {SETTING}: false, or take {token!r} out of the text"
                )


def _rows(source: str, found: Found, config: DataConfig, where: str) -> Iterator[tuple[str, Any]]:
    """(where a row stands, in words; the row)."""
    if not found.files:
        for number, row in enumerate(_hub_rows(source, config, where), 1):
            yield f"{source!r}, row {number}", row
    for file in found.files:
        unit = "line" if file.is_json_lines else "row"
        for number, row in rows(file, config.text_column, where):
            yield f"{file.name!r}, {unit} {number}", row


def _hub_rows(source: str, config: DataConfig, where: str) -> Iterator[Any]:
    import datasets

    datasets.disable_progress_bars()
    with reading(source, where):
        yield from datasets.load_dataset(source, config.config_name, split=config.split, streaming=True)


def _texts(
    placed: Iterator[tuple[str, Any]],
    source: str,
    config: DataConfig,
    where: str,
    tokenizer: Any,
    facts: TextFacts,
    max_rows: int | None,
) -> Iterator[str]:
    column = config.text_column
    seen: dict[str, None] = {}
    is_there, any_text, looked_at = False, False, 0
    for place, row in islice(placed, max_rows):
        looked_at += 1
        if not isinstance(row, dict):
            raise DataError(where, f"{place} is {type_of(row)}, not an object", "write rows with a text column")
        value = find(row, column)
        is_there = is_there or value is not MISSING
        if not is_there and looked_at <= _FIRST_ROWS:
            seen.update(dict.fromkeys(columns_of(row)))
        if text := text_of(value, tokenizer, column, place, where):
            any_text = True
            yield text
        else:
            facts.dropped_rows += 1
    if looked_at and not is_there:
        names = sorted(seen)[:_NAMES_SHOWN] + ["..."] * (len(seen) > _NAMES_SHOWN)
        first = f" in its first {looked_at} rows" if looked_at == max_rows else ""
        raise DataError(f"{where}: {source!r}", f"no column {column!r}{first}", f"data.text_column is one of {names}")
    if looked_at and not any_text and looked_at != max_rows:
        problem = f"nothing in column {column!r}, all {looked_at} rows without text dropped"
        raise DataError(f"{where}: {source!r}", problem, "set data.text_column to the column that holds the text")

"""The bytes of a file as text, or as rows. Everything streams: no file is held in memory whole."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from puzzle_ray.data.files import TextFile
from puzzle_ray.data.foreign import reading
from puzzle_ray.errors import DataError

_BLOCK_BYTES = 1 << 20
_COUNTED_BYTES = 64 << 20  # how far a file that is no UTF-8 is read on, to say how far it is from being it
_LONGEST_VALUE = 256 << 20  # characters of one value in a .json file
_ROWS_AT_ONCE = 512

Row = tuple[int, Any]  # its number in the file, counted from 1 (of a .jsonl file: the line), and its value


def text_chunks(file: TextFile, where: str) -> Iterator[str]:
    """The text of a file, piece by piece, line ends as `\\n`, without a byte order mark. Raises DataError for bytes that are no UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    first = True
    try:
        for block in _blocks(file, where):
            if first and block.count(0) * 10 > len(block):
                raise _not_utf8(file, where)
            first = False
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(file, where) from None


def undecodable_bytes(block: bytes, decoder: codecs.IncrementalDecoder | None = None) -> int:
    """How many bytes are no UTF-8. A decoder with the error handler `surrogateescape` carries what is open into the next block."""
    text = decoder.decode(block) if decoder else block.decode("utf-8", "surrogateescape")
    return 0 if text.isascii() else sum(1 for letter in text if "\udc80" <= letter <= "\udcff")


def _not_utf8(file: TextFile, where: str) -> DataError:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    bad = seen = zeros = 0
    start = b""
    for block in _blocks(file, where):
        start = start or block[:2]
        bad += undecodable_bytes(block, decoder)
        zeros += block.count(0)
        seen += len(block)
        if seen >= _COUNTED_BYTES:
            break
    bad += len(decoder.getstate()[0])  # a character cut off by the end
    counted = f"{bad} of the {'first ' if seen >= _COUNTED_BYTES else ''}{seen} bytes are no UTF-8"
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or zeros * 10 > seen:
        problem = f"{file.name!r} looks like UTF-16 ({counted}, {zeros} are zero)"
    else:
        problem = f"{file.name!r} is not UTF-8 ({counted})"
    return DataError(where, problem, "save it as UTF-8, or leave it out")


def rows(file: TextFile, column: str, where: str) -> Iterator[Row]:
    """The rows of a JSON or parquet file. Of parquet only `column` is read; a file without it gives rows of its columns, all None."""
    if file.format == "parquet":
        return _parquet_rows(file, column, where)
    return _json_lines(file, where) if file.is_json_lines else _json_values(file, where)


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8. JSON may hold half of a surrogate pair, which cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _json_lines(file: TextFile, where: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, where), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _broken_json(file, number, error, where) from None
            yield number, value


def _lines(file: TextFile, where: str) -> Iterator[str]:
    parts: list[str] = []
    for chunk in text_chunks(file, where):
        first, *others = chunk.split("\n")
        parts.append(first)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _broken_json(file: TextFile, line: int, error: Exception | str, where: str) -> DataError:
    words = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(where, f"{file.name!r}, line {line}: no valid JSON ({words})", "mend the line, or leave the file out")


class _Values:
    """Reads JSON values one after the other from chunks of text, and knows the line it is in."""

    def __init__(self, file: TextFile, where: str) -> None:
        self.file, self.where = file, where
        self.chunks, self.decoder = text_chunks(file, where), json.JSONDecoder()
        self.text, self.position, self.line = "", 0, 1

    def grow(self) -> bool:
        """Reads on, about as much again as is there. False at the end of the file."""
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :], 0
        wanted, parts, size = max(1, len(self.text)), [self.text], 0
        for chunk in self.chunks:
            parts.append(chunk)
            size += len(chunk)
            if size >= wanted:
                break
        self.text = "".join(parts)
        return size > 0

    def peek(self) -> str:
        """The next character that is no white space, and "" at the end of the file."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in " \t\r\n":
                    return self.text[self.position]
                self.position += 1
            if not self.grow():
                return ""

    def fail(self, error: Exception | str, line: int = 1) -> DataError:
        return _broken_json(self.file, self.line + self.text.count("\n", 0, self.position) + line - 1, error, self.where)

    def value(self) -> Any:
        while True:
            try:
                value, self.position = self.decoder.raw_decode(self.text, self.position)
                return value
            except RecursionError as error:
                raise self.fail(error) from None
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(self.text) - 32 or error.msg.startswith("Unterminated string")
                inside = json.JSONDecodeError(error.msg, self.text[self.position :], error.pos - self.position)
                if len(self.text) > _LONGEST_VALUE:
                    raise self.fail(f"one value is longer than {_LONGEST_VALUE} characters") from None
                if not cut_off or not self.grow():
                    raise self.fail(error, inside.lineno) from None


def _json_values(file: TextFile, where: str) -> Iterator[Row]:
    """One array of rows, or rows one after the other."""
    values = _Values(file, where)
    is_array = values.peek() == "["
    values.position += is_array
    number = 0
    while (letter := values.peek()) and not (is_array and letter == "]"):
        if is_array and number:
            if letter != ",":
                raise values.fail("expecting ',' or ']'")
            values.position += 1
            values.peek()
        number += 1
        yield number, values.value()
    if is_array:
        if not letter:
            raise values.fail("the array has no end")
        values.position += 1
        if values.peek():
            raise values.fail("something follows the array")


def _parquet_rows(file: TextFile, column: str, where: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    with reading(file.name, where), _seekable(file, where) as handle:
        table = pq.ParquetFile(handle)
        names = [table.schema.column(index).path for index in range(len(table.schema.names))]
        if not any(name == column or name.startswith(column + ".") for name in names):
            empty = dict.fromkeys(table.schema_arrow.names)
            yield from ((row, empty) for row in range(1, table.metadata.num_rows + 1))
            return
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
            for value in _python_rows(file, batch, number, where):
                number += 1
                yield number, value


def _python_rows(file: TextFile, batch: Any, number: int, where: str) -> Iterator[Any]:
    for index in range(batch.num_rows):
        try:
            yield {name: batch.column(name)[index].as_py() for name in batch.schema.names}
        except UnicodeDecodeError as error:
            bad = undecodable_bytes(error.object)
            problem = f"{file.name!r}, row {number + index + 1}: {bad} of {len(error.object)} bytes are no UTF-8"
            raise DataError(where, problem, "write the column as UTF-8") from None


@contextmanager
def _seekable(file: TextFile, where: str) -> Iterator[Any]:
    """A file that can be read from any place; one behind http is copied to a temporary file, since not every server can do that."""
    with reading(file.name, where), file.open() as handle:
        if not file.is_http:
            yield handle
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(handle, copy, _BLOCK_BYTES)
            copy.seek(0)
            yield copy


def _blocks(file: TextFile, where: str) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    with reading(file.name, where, "name a file that can be read, or leave it out"), file.open() as raw:
        stream = _decompressed(raw, file.compression)
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _decompressed(raw: Any, compression: str | None) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if compression == "bz2":
        return bz2.BZ2File(raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    if compression == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw

"""Tables as parquet files: rows of one flat dataclass."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

Row = TypeVar("Row")


def rows_to_parquet(rows: Sequence[object], kind: type[object], metadata: Mapping[str, object]) -> bytes:
    """Rows of one flat dataclass as a parquet file. `metadata` is stored as JSON in the file's schema."""
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(kind)}  # type: ignore[arg-type]
    table = pa.table(columns).replace_schema_metadata({"puzzle_ray": json.dumps(metadata)})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def rows_from_parquet(data: bytes, kind: type[Row]) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """The inverse of `rows_to_parquet`."""
    table = pq.read_table(io.BytesIO(data))
    metadata = json.loads((table.schema.metadata or {}).get(b"puzzle_ray", b"{}"))
    return tuple(kind(**row) for row in table.to_pylist()), metadata

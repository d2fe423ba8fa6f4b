"""Parquet files read by row group: only the columns that are needed, some hundred rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_octo.data.corpora.lines import open_input
from megatron_octo.data.corpora.render import BadRecord
from megatron_octo.errors import DataError

_ROWS = 256
_BUFFER = 1 << 20  # without one, a column of a whole row group is read at once


def numbered_rows(
    path: str, columns: Sequence[str], optional: Sequence[str] = (), part: tuple[int, int] | None = None, first: int = 0
) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Read rows of a parquet file; memory for some pages of the columns and some hundred rows.

    Args:
        path: local, or a URL that fsspec knows.
        columns: names that the file must have.
        optional: names of columns to read where it has them.
        part: row groups to read, first and one beyond the last; all by default.
        first: rows before them.

    Yields:
        Number of the row, from 1, and its values by column, or what is wrong with it.

    Raises:
        DataError: the file is missing or damaged, or lacks a column.
    """
    import pyarrow

    number = first
    try:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise DataError(
                        f"{path} has no column {column!r} (it has {', '.join(names)})",
                        "the adapter takes its text from there",
                        "tell in fields which column stands for it, or use another adapter",
                    )
            groups = range(*(part or (0, file.num_row_groups)))
            wanted = [*columns, *(column for column in optional if column in names)]
            for batch in file.iter_batches(_ROWS, list(groups), wanted, use_threads=False):
                for row in _rows_of(batch):
                    number += 1
                    yield number, row
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read beyond row {number} ({' '.join(str(error).split())})",
            "a file that ends early may lack any number of documents",
            "fetch the file again",
        ) from None


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """Open a parquet file, local or behind a URL, as pyarrow's `ParquetFile`."""
    import pyarrow.parquet as parquet

    if "://" not in path:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file
        return
    with open_input(path) as raw, parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False) as file:
        yield file


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | BadRecord]:
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:
        yield from (_row_of(batch, place) for place in range(batch.num_rows))
        return
    yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _row_of(batch: Any, place: int) -> dict[str, Any] | BadRecord:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[place].as_py()
        except UnicodeDecodeError as wrong:
            return BadRecord("not UTF-8", f" at byte {wrong.start + 1} of {name!r}")
    return row

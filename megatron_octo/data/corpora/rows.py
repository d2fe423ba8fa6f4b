"""Parquet files read by row group: only the columns that are needed, some hundred rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_octo.data.corpora.lines import open_input
from megatron_octo.errors import DataError

_ROWS = 256


def numbered_rows(
    path: str, columns: Sequence[str], optional: Sequence[str] = (), part: tuple[int, int] | None = None, first: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read rows of a parquet file.

    Args:
        path: local, or a URL that fsspec knows.
        columns: names that the file must have.
        optional: names of columns to read where it has them.
        part: row groups to read, first and one beyond the last; all by default.
        first: rows before them.

    Yields:
        Number of the row, from 1, and its values by column.

    Raises:
        DataError: the file is missing or damaged, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    number = first
    try:
        with open_input(path) as raw, parquet.ParquetFile(raw, pre_buffer=False) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise DataError(
                        f"{path} has no column {column!r} (it has {', '.join(names)})",
                        "the adapter takes its text from there",
                        f"name the column that stands for it: fields: {{{column}: ...}}, or use another adapter",
                    )
            groups = range(*(part or (0, file.num_row_groups)))
            wanted = [*columns, *(column for column in optional if column in names)]
            for batch in file.iter_batches(_ROWS, list(groups), wanted, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read beyond row {number} ({error})",
            "a file that ends early may lack any number of documents",
            "fetch the file again",
        ) from None

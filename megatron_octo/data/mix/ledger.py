"""Which windows hold a document, and where in an order they are read. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_octo.config.blends import Blend
from megatron_octo.data.index.pairs import Index
from megatron_octo.data.index.table import DocumentTable, docs_path
from megatron_octo.data.mix.epochs import Epochs
from megatron_octo.data.mix.order import order
from megatron_octo.errors import DataError


def windows_of_document(epochs: Epochs, index: Index, document: int) -> np.ndarray:
    """The windows of a source that hold a token of a document, a last label among them.

    Args:
        epochs: passes over the source, as training reads them.
        index: of the source.
        document: its place in the pair.

    Returns:
        Numbers among the source's windows in the order they are read, int64, increasing.
    """
    documents = index.documents
    passes = len(epochs.document_index) // documents
    each = len(epochs.shuffle_index) // max(1, passes)
    if not index.lengths[document]:
        return np.empty(0, np.int64)
    places = np.flatnonzero(epochs.document_index == document)  # one in every pass
    borders = np.ascontiguousarray(epochs.sample_index[:, 0])
    first = np.arange(passes) * (each + 1)
    lowest = np.maximum(np.searchsorted(borders, places, "left") - 1, first)
    highest = np.minimum(np.searchsorted(borders, places, "right") - 1, first + each - 1)
    found = []
    for number, (low, high) in enumerate(zip(lowest.tolist(), highest.tolist(), strict=True)):
        rows = epochs.shuffle_index[number * each : (number + 1) * each]
        found.append(number * each + np.flatnonzero((rows >= low) & (rows <= high)))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def places_of_document(
    epochs: Epochs, index: Index, document: int, blends: Sequence[Blend], source: str, windows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where in an order a document is read.

    Args:
        epochs: passes over the source; as many as the order takes.
        index: of the source.
        document: its place in the pair.
        blends: the mixtures of the order.
        source: its name in them.
        windows: length of the order.

    Returns:
        Windows of the order, int64, increasing; and the pass over the source that each belongs to, from 0, int64.
    """
    places = order(blends, windows).windows_of(source)
    numbers = windows_of_document(epochs, index, document)
    numbers = numbers[numbers < len(places)]
    each = max(1, len(epochs.shuffle_index) // max(1, len(epochs.document_index) // index.documents))
    return places[numbers], numbers // each


def find_document(name: str, sources: dict[str, Path]) -> list[tuple[str, int]]:
    """The sources that hold a document, and its place in each: files of one name may be in several data directories.

    Args:
        name: `<corpus>/<file>:<line>`.
        sources: prefixes of the pairs to look into, by name.

    Raises:
        DataError: none of them holds it, or none has a table of documents.
    """
    tables = {source: docs_path(prefix) for source, prefix in sources.items() if docs_path(prefix).is_file()}
    if not tables:
        raise DataError(
            f"{', '.join(map(str, sources.values()))}: no table of documents (.docs) beside the pair",
            "a document is known by its id where the table is that a build writes",
            "name it by its place: --index N --source NAME",
        )
    places = {source: DocumentTable(path).find(name) for source, path in tables.items()}
    found = [(source, place) for source, place in places.items() if place is not None]
    if found:
        return found
    example = DocumentTable(next(iter(tables.values()))).id_of(0)
    raise DataError(
        f"no source holds a document {name!r}",
        f"the tables of {', '.join(tables)} were looked through; an id reads like {example}",
        "check the id: octo data inspect PREFIX shows some",
    )


def id_of(prefix: Path, place: int) -> str | None:
    """The id of a document; None where no table says it."""
    path = docs_path(prefix)
    return DocumentTable(path).id_of(place) if path.is_file() else None

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
from megatron_octo.files import read_json


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
    _refuse_left_out(name, sources)
    raise DataError(
        f"no source holds a document {name!r}",
        f"the tables of {', '.join(tables)} were looked through; an id reads like {example}",
        "check the id: octo data inspect PREFIX shows some",
    )


def _refuse_left_out(name: str, sources: dict[str, Path]) -> None:
    """Check whether a build says that it left a document out: its manifest names the first few, and counts all.

    Raises:
        DataError: it names this one; or it left out documents of this corpus, and this may be one of them.
    """
    corpus, _, place = name.partition("/")
    for prefix in sources.values():
        manifest = read_json(prefix.parent / "manifest.json")
        facts = manifest.get("sources", {}).get(prefix.name) if isinstance(manifest, dict) else None
        if prefix.name != corpus or facts is None:
            continue
        account, examples = facts.get("accounts", {}), (manifest.get("cleaning") or {}).get("examples", {})
        named = [
            f"{reason.replace('_', ' ')} of {one['other']}"
            for reason, several in examples.items()
            for one in several
            if one["document"] == name
        ]
        named += [line.removeprefix(f"{place}: ") for line in account.get("first", []) if line.startswith(f"{place}: ")]
        if named:
            raise DataError(f"no source holds the document {name!r}", f"{prefix.parent} left it out: {named[0]}")
        counts = {**account.get("skipped", {}), **account.get("removed", {})}
        counts |= {"beyond its token budget": facts.get("beyond_budget", {}).get("documents", 0)}
        left = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items() if count)
        if left:
            raise DataError(
                f"no source holds a document {name!r}",
                f"of {corpus} the build in {prefix.parent} left out {left}, without a list of them all",
                f"check the id, or look at examples: octo data report {prefix.parent}",
            )


def id_of(prefix: Path, place: int) -> str | None:
    """The id of a document; None where no table says it."""
    path = docs_path(prefix)
    return DocumentTable(path).id_of(place) if path.is_file() else None

"""One shard -> one piece of an indexed dataset: pair, table of documents, histogram of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.data.corpora.read import batches
from megatron_octo.data.engine.stage import advance
from megatron_octo.data.index.encode import ControlToken, Encoder
from megatron_octo.data.index.pairs import bin_path
from megatron_octo.data.index.table import TableWriter, docs_path, histogram_path, save_histogram
from megatron_octo.data.index.writer import IndexedWriter
from megatron_octo.errors import DataError
from megatron_octo.files import hash_weights, replacing

if TYPE_CHECKING:
    from datatrove.data import Document

    from megatron_octo.data.clean.removals import Removal

BATCH = 1 << 20
"""Characters of a batch, at least; a longer document is a batch of its own."""
_SMALL = 1 << 12
_BUDGET = 8  # batches that a small budget is cut into, at least, so that reading ends near it


def without(documents: Iterable[Document], removals: Iterable[Removal], counted: dict[str, int]) -> Iterator[Document]:
    """Documents less those that are removed, which are counted under their reason; takes no memory for either.

    Args:
        documents: of a shard, all from the first.
        removals: in the order of places.
        counted: gets the number of removals by reason.
    """
    left = iter(removals)
    following = next(left, None)
    for place, document in enumerate(documents):
        if following is None or place < following.place:
            yield document
            continue
        if place > following.place:
            raise AssertionError(f"{following} comes after a later place: it would stay")
        counted[following.reason] = counted.get(following.reason, 0) + 1
        following = next(left, None)


def write_piece(
    documents: Iterable[Document], prefix: Path, encoder: Encoder, skipped: dict[str, int], limit: int | None = None
) -> dict[str, Any]:
    """Tokenise documents into a pair with its table and histogram.

    Takes the same memory for any number of documents, but for four bytes each, twice; uses one thread.

    Args:
        documents: texts with their ids.
        prefix: path of the piece without suffix.
        encoder: the tokenizer under the rules of the build.
        skipped: counts the documents without a single token, by reason.
        limit: stop after the document that reaches so many tokens.

    Returns:
        documents, tokens, `blake3`: hash of the token file.

    Raises:
        DataError: a text became a control token, or an id is no id of a line.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    table = TableWriter()
    size = BATCH if limit is None else min(BATCH, max(_SMALL, limit // _BUDGET))
    with IndexedWriter(prefix, encoder.vocabulary, encoder.rows, shared=True) as writer:
        for batch in batches(documents, size):
            _write_batch(batch, writer, table, encoder, skipped)
            if limit is not None and writer.tokens >= limit:
                break
        with replacing(docs_path(prefix)) as path:
            table.write(path)
        with replacing(histogram_path(prefix)) as path:
            save_histogram(path, writer.counts)
        writer.publish()
    return {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "blake3": hash_weights(bin_path(prefix)),
    }


def _write_batch(
    batch: list[Document], writer: IndexedWriter, table: TableWriter, encoder: Encoder, skipped: dict[str, int]
) -> None:
    try:
        found = encoder.encode([document.text for document in batch])
    except ControlToken as error:
        raise DataError(
            f"{batch[error.place].id}: its text became control token {error.token} of {encoder.path}",
            "index.special_tokens = text says that marks written in a text stay text",
            "set index.special_tokens: control, or use another tokenizer",
        ) from None
    for document, length in zip(batch, found.lengths, strict=True):
        if length:
            table.add(document.id)
        else:
            skipped["no tokens"] = skipped.get("no tokens", 0) + 1
    advance(sum(found.lengths))
    writer.write(found.content, [length for length in found.lengths if length], found.counts)

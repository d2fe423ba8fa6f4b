"""Facts about an indexed pair, for people, after everything in it was checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_octo.data.index.pairs import read_index


def inspect(prefix: Path, first: int = 3, tokenizer: Path | None = None) -> dict[str, Any]:
    """Facts about a pair, for people.

    Args:
        prefix: path of the pair without suffix.
        first: how many documents to show.
        tokenizer: directory to decode with; by default `tokenizer/` beside the pair, if there.

    Returns:
        documents, tokens, dtype, bytes, largest_token, shortest, longest and `first`: the first documents as text
        (as token ids where there is no tokenizer).

    Raises:
        DataError: the pair is missing or damaged.
    """
    index = read_index(prefix)
    directory = tokenizer or prefix.parent / "tokenizer"
    shown: list[Any] = [index.document(number).tolist() for number in range(min(first, index.documents))]
    if directory.is_dir():
        from megatron_octo.data.index.encode import load_encoder

        encoder = load_encoder(directory)
        shown = [encoder.decode(tokens) for tokens in shown]
    tokens = index.all_tokens()
    return {
        "prefix": str(prefix),
        "documents": index.documents,
        "tokens": index.tokens,
        "dtype": index.dtype.name,
        "bytes": tokens.nbytes,
        "largest_token": int(tokens.max()) if len(tokens) else None,
        "shortest": int(index.lengths.min()) if index.documents else None,
        "longest": int(index.lengths.max()) if index.documents else None,
        "first": shown,
    }

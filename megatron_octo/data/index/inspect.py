"""Facts about an indexed pair, for people, after everything in it was checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.index.encode import Encoder, load_encoder
from megatron_octo.data.index.pairs import Index, bin_path, check_present, idx_path, stretches
from megatron_octo.data.index.table import DocumentTable, docs_path
from megatron_octo.data.index.verify import verify_pair
from megatron_octo.data.index.writer import largest_token
from megatron_octo.errors import DataError
from megatron_octo.files import read_json

_SHOWN = 300  # characters of a document
_FREQUENT = 10


def inspect(prefix: Path, first: int = 3, tokenizer: Path | None = None) -> dict[str, Any]:
    """Check a pair and say what it holds.

    Args:
        prefix: path of the pair without suffix.
        first: how many documents to show: the first, the last, and others between them at equal distance.
        tokenizer: directory or model file to decode with; by default `tokenizer/` beside the pair, if there.

    Returns:
        documents, tokens, dtype, bytes, largest_token, shortest and longest document; `tokenizer`, `settings`, `code`,
        `versions`, `inputs` and `source` from the manifest beside it, where there is one; `frequent`: the most
        frequent tokens as text, count and share; `samples`: documents as place, id and text (token ids where there is
        no tokenizer); `checked`: what was compared with what, and what was not.

    Raises:
        DataError: the pair is missing, damaged, or not as its manifest says.
    """
    check_present(prefix)
    manifest = read_json(prefix.parent / "manifest.json") or {}
    facts = manifest.get("sources", {}).get(prefix.name)
    made = manifest if facts is not None else {}
    encoder = _encoder(prefix, tokenizer, made)
    rows = encoder.rows if encoder else None
    index, counts = verify_pair(prefix, rows, made.get("tokenizer", {}).get("end_of_text"), facts)
    shortest, longest = _extremes(index)
    told = {
        "prefix": str(prefix),
        "documents": index.documents,
        "tokens": index.tokens,
        "dtype": index.dtype.name,
        "bytes": index.tokens * index.dtype.itemsize,
        "largest_token": largest_token(counts),
        "shortest": shortest,
        "longest": longest,
    }
    told["samples"] = [show_document(index, place, encoder) for place in spread_places(index.documents, first)]
    told["frequent"] = frequent_tokens(counts, encoder, _FREQUENT)
    if facts is not None:
        told |= {"settings": made["settings"].get("index"), "source": facts}
        told["inputs"] = made["inputs"].get(f"corpora.{prefix.name}")
        told |= {name: made[name] for name in ("tokenizer", "versions", "code")}
    against = ["the index"]
    against += [f"{rows} rows of the tokenizer"] if rows else []
    against += ["the manifest's hashes"] if facts is not None else []
    told["checked"] = f"every token against {', '.join(against)}"
    if facts is None:
        why = f"the manifest does not list {prefix.name}" if manifest else "there is no manifest.json beside the pair"
        told["checked"] += f"; hashes were not compared, for {why}"
    return told


def list_pairs(directory: Path) -> dict[str, Any] | None:
    """What the manifest of a finished build lists; None where a path is that of a pair.

    Returns:
        directory, documents, tokens, `pairs`: prefix, documents and tokens of each, and `checked`: nothing is.

    Raises:
        DataError: it is neither.
    """
    if directory.suffix in (".bin", ".idx") or bin_path(directory).exists() or idx_path(directory).exists():
        return None
    manifest = read_json(directory / "manifest.json")
    if not isinstance(manifest, dict) or "sources" not in manifest:
        raise DataError(
            f"{directory} holds no finished build, and {bin_path(directory)} does not exist",
            "a build's manifest.json comes last; a pair is named without suffix",
            "finish the build with `octo data build`, or mend the path",
        )
    return {
        "directory": str(directory),
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
        "pairs": [
            {"prefix": str(directory / name), "documents": facts["documents"], "tokens": facts["tokens"]}
            for name, facts in manifest["sources"].items()
        ],
        "checked": "nothing: these are the manifest's words; octo data inspect PREFIX looks at a pair, "
        "octo data verify at all files",
    }


def _encoder(prefix: Path, tokenizer: Path | None, made: dict[str, Any]) -> Encoder | None:
    path = tokenizer or prefix.parent / "tokenizer"
    if tokenizer is None and not path.is_dir():
        return None
    rules = made.get("settings", {}).get("index")
    return load_encoder(path, IndexConfig(**rules) if rules else IndexConfig(eos="none", special_tokens="control"))


def _extremes(index: Index) -> tuple[int | None, int | None]:
    parts = [(int(lengths.min()), int(lengths.max())) for lengths in stretches(index.lengths)]
    return (min(low for low, _ in parts), max(high for _, high in parts)) if parts else (None, None)


def frequent_tokens(counts: np.ndarray, encoder: Encoder | None, most: int) -> list[dict[str, Any]]:
    """The most frequent tokens: text (the id where there is no tokenizer), count, and share of all tokens.

    Args:
        counts: how often each token occurs, int64 [rows].
        encoder: to decode with.
        most: how many; tokens that never occur are left out.
    """
    total = max(1, int(counts.sum()))
    ids = [int(token) for token in np.argsort(-counts, kind="stable")[:most] if counts[token]]
    return [
        {
            "token": encoder.decode([token]) if encoder else token,
            "count": int(counts[token]),
            "share": round(int(counts[token]) / total, 4),
        }
        for token in ids
    ]


def spread_places(documents: int, wanted: int) -> list[int]:
    """Places of documents to show: the first, the last, and others between them at equal distance."""
    if wanted >= documents or wanted < 2:
        return list(range(min(wanted, documents)))
    return [number * (documents - 1) // (wanted - 1) for number in range(wanted)]


def show_document(index: Index, place: int, encoder: Encoder | None, most: int = _SHOWN) -> dict[str, Any]:
    """One document: its place, tokens, id where there is a table, and text (token ids where there is no tokenizer).

    Args:
        index: of the pair.
        place: of the document.
        encoder: to decode with.
        most: characters of its text; a longer one is shown by its beginning and its end.
    """
    tokens = index.document(place).tolist()
    found: dict[str, Any] = {"document": place, "tokens": len(tokens)}
    if docs_path(index.prefix).is_file():
        found["id"] = DocumentTable(docs_path(index.prefix)).id_of(place)
    if encoder is None:
        return {**found, "ids": tokens[:most]}
    text = encoder.decode(tokens)
    return {**found, "text": text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"}

"""Everything the page of a data directory shows, as numbers and texts: what `octo data report --json` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.corpora.registry import ADAPTERS
from megatron_octo.data.engine.publish import MANIFEST
from megatron_octo.data.index.encode import Encoder, load_encoder
from megatron_octo.data.index.inspect import frequent_tokens, show_document, spread_places
from megatron_octo.data.index.pairs import Index, read_index
from megatron_octo.data.index.table import read_histogram
from megatron_octo.data.report.examples import Others
from megatron_octo.data.report.lengths import length_histogram
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file, read_json

_FREQUENT, _SAMPLES, _SHOWN = 24, 3, 700
_POINTS = 60  # of a curve of frequency over rank


def build_facts(out: Path) -> dict[str, Any]:
    """Read a finished data directory.

    Files are compared with the manifest by sizes, counts of documents and counts of tokens; hashes of data files are
    not computed: `octo data verify` does that, and takes as long as reading everything.

    Args:
        out: data directory.

    Raises:
        DataError: there is no manifest of a build, or a file is missing, damaged or not as the manifest says.
    """
    manifest = _read_manifest(out)
    encoder = load_encoder(out / "tokenizer", _rules(out, manifest))
    total, sources = np.zeros(encoder.rows, np.int64), {}
    for name, known in manifest["sources"].items():
        index, counts = _open(out, name, known, encoder.rows)
        total += counts
        sources[name] = _source(manifest, name, known, index, counts, encoder)
    return {
        "name": out.absolute().name,
        "code": manifest["code"],
        "versions": manifest["versions"],
        "manifest_sha256": hash_file(out / MANIFEST),
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
        "tokenizer": {**manifest["tokenizer"], "used": int(np.count_nonzero(total))},
        "frequent": frequent_tokens(total, encoder, _FREQUENT),
        "sources": sources,
        "totals": _totals(sources),
        "cleaning": _cleaning(out, manifest, encoder),
        "problems": manifest["problems"],
        "inputs": manifest["inputs"],
        "settings": manifest["settings"],
    }


def _read_manifest(out: Path) -> dict[str, Any]:
    manifest = read_json(out / MANIFEST)
    if not isinstance(manifest, dict):
        raise DataError(
            f"{out / MANIFEST} does not exist or is damaged",
            "a report is made of a finished build",
            "name the --out of `octo data build`, after it has ended",
        )
    needed = ("code", "versions", "settings", "inputs", "tokenizer", "sources", "problems", "documents", "tokens")
    missing = [name for name in needed if name not in manifest]
    if missing:
        raise DataError(
            f"{out / MANIFEST} is not the manifest of a build: it has no {missing[0]}",
            fix="name the --out of `octo data build`",
        )
    return manifest


def _rules(out: Path, manifest: dict[str, Any]) -> IndexConfig:
    try:
        return IndexConfig(**manifest["settings"].get("index", {}))
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise DataError(
            f"{out / MANIFEST}: settings.index.{where}: {wrong['msg']}", fix="build it with this version"
        ) from None


def _open(out: Path, name: str, known: dict[str, Any], rows: int) -> tuple[Index, np.ndarray]:
    """A source's index and histogram, compared with what the manifest counts."""
    index, counts = read_index(out / name), read_histogram(out / name)
    if len(counts) != rows:
        raise DataError(f"{out / name}: its histogram has {len(counts)} tokens, the tokenizer {rows}", fix=_AGAIN)
    found = {"documents": index.documents, "tokens": index.tokens, "tokens of the histogram": int(counts.sum())}
    for what, count in found.items():
        stated = known["documents" if what == "documents" else "tokens"]
        if count != stated:
            raise DataError(f"{out / name}: {count} {what}, but the manifest says {stated}", fix=_AGAIN)
    return index, counts


_AGAIN = "it was altered after it was built: build the data again"


def _source(
    manifest: dict[str, Any], name: str, known: dict[str, Any], index: Index, counts: np.ndarray, encoder: Encoder
) -> dict[str, Any]:
    corpus = manifest["settings"].get("corpora", {}).get(name)
    adapter = ADAPTERS.get(corpus["adapter"]) if corpus else None
    places = spread_places(index.documents, _SAMPLES)
    return {
        "generated": corpus is None,
        "adapter": corpus["adapter"] if corpus else None,
        "origin": known.get("origin") or (adapter and (adapter.hub or adapter.title)),
        "published": bool(adapter and adapter.hub),
        "licence": known.get("licence") or (adapter.licence or None if adapter else None),
        "gated": adapter.gated or None if adapter else None,
        "documents": index.documents,
        "tokens": index.tokens,
        "share_of_documents": index.documents / manifest["documents"],
        "share_of_tokens": index.tokens / manifest["tokens"],
        "bytes": known["bytes"],
        "dtype": known["dtype"],
        "sha256": known["sha256"],
        "unigram_entropy": known["unigram_entropy"],
        "used": int(np.count_nonzero(counts)),
        "lengths": length_histogram(index.lengths),
        "ranks": _ranks(counts),
        "accounts": _accounts(known),
        "samples": [show_document(index, place, encoder, _SHOWN) for place in places],
    }


def _ranks(counts: np.ndarray) -> list[list[float]]:
    """Share of the tokens that the token of a rank has: points at ranks whose distance grows."""
    ordered = np.sort(counts[counts > 0])[::-1]
    if not len(ordered):
        return []
    ranks = np.unique(np.geomspace(1, len(ordered), _POINTS).astype(int))
    return [[int(rank), float(ordered[rank - 1] / ordered.sum())] for rank in ranks]


def _accounts(known: dict[str, Any]) -> dict[str, Any] | None:
    """What became of every record, and whether it adds up; None where the manifest keeps no account."""
    own = known.get("accounts")
    if own is None:
        return None
    beyond = known["beyond_budget"]["documents"]
    skipped, removed = sum(own["skipped"].values()), sum(own["removed"].values())
    return {
        "read": own["read"],
        "documents": known["documents"],
        "beyond_budget": beyond,
        "skipped": own["skipped"],
        "removed": own["removed"],
        "first": own["first"],
        "left_out": skipped + removed,
        "adds_up": own["read"] == known["documents"] + beyond + skipped + removed,
    }


def _totals(sources: dict[str, Any]) -> dict[str, Any]:
    """Sums over the sources that keep accounts."""
    kept = [source["accounts"] for source in sources.values() if source["accounts"] is not None]
    names = ("skipped", "removed")
    return {
        "read": sum(account["read"] for account in kept),
        "beyond_budget": sum(account["beyond_budget"] for account in kept),
        **{name: sum(sum(account[name].values()) for account in kept) for name in names},
        "adds_up": all(account["adds_up"] for account in kept) if kept else None,
        "without_accounts": [name for name, source in sources.items() if source["accounts"] is None],
    }


def _cleaning(out: Path, manifest: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    """What was asked and found; `deduplicate` and `decontaminate` are None where they were not asked for."""
    settings, found = manifest["settings"], manifest.get("cleaning") or {}
    others = Others(out, manifest, encoder)
    shown = {reason: [others.beside(one) for one in several] for reason, several in found.get("examples", {}).items()}
    return {
        "deduplicate": settings.get("deduplicate"),
        "decontaminate": settings.get("decontaminate"),
        "corpora": found.get("corpora", {}),
        "examples": shown,
        "touched": found.get("touched"),
        "touched_examples": [others.beside(one) for one in found.get("touched_examples", [])],
        "benchmarks": found.get("benchmarks") or (found.get("recall") or {}).get("benchmarks"),
        "recall": found.get("recall"),
    }

"""What tells one dataset from another, wherever it lies; found without reading all of it at every start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_octo.data.index.digest import spot_digest
from megatron_octo.data.index.pairs import Index, bin_path, idx_path
from megatron_octo.data.index.table import pair_files
from megatron_octo.files import hash_file, read_json

_MANIFEST = "manifest.json"


def content_digest(index: Index) -> dict[str, str]:
    """What tells a dataset from another, wherever it lies.

    Returns:
        `index`: SHA-256 of the `.idx`, the lengths of all documents: the manifest's, where the files have the size it
        states and the `.idx` has not been written since, nor another one come in its place; and `tokens`: a
        `spot_digest` of the `.bin`, which shows another text or tokenizer: to read all tokens at each start would take
        hours.
    """
    known = _manifests_digest(index)
    return {"index": known or hash_file(idx_path(index.prefix)), "tokens": spot_digest(bin_path(index.prefix))}


def manifest_of(prefix: Path) -> dict[str, Any] | None:
    """The manifest beside a pair; None where there is none, or the files that lie there are not those it speaks of.

    A copy may keep the time of what it is a copy of: another order of the same documents, made before this one, has
    other lengths all over, which a `spot_digest` shows.
    """
    manifest = read_json(prefix.parent / _MANIFEST)
    try:
        facts = manifest["sources"][prefix.name]
        fits = facts["bytes"] == sum(file.stat().st_size for file in pair_files(prefix))
        return manifest if fits and facts["spot"] == spot_digest(idx_path(prefix)) else None
    except (OSError, LookupError, TypeError):
        return None


def _manifests_digest(index: Index) -> str | None:
    """The hash of an index as the build wrote it into its manifest, last of all; None where that may not fit."""
    manifest = manifest_of(index.prefix)
    try:
        facts, idx = manifest["sources"][index.prefix.name], idx_path(index.prefix)
        same = (facts["documents"], facts["tokens"]) == (index.documents, index.tokens)
        if same and idx.stat().st_mtime_ns <= (index.prefix.parent / _MANIFEST).stat().st_mtime_ns:
            return str(facts["sha256"][idx.name])
    except (OSError, LookupError, TypeError):
        pass
    return None

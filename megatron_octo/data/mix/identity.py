"""What tells one dataset from another, wherever it lies; found without reading all of it at every start."""

from __future__ import annotations

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


def _manifests_digest(index: Index) -> str | None:
    """The hash of an index as the build wrote it into its manifest, last of all; None where that may not fit.

    A copy may keep the time of what it is a copy of: another order of the same documents, made before this one, has
    other lengths all over.
    """
    path, name = index.prefix.parent / _MANIFEST, index.prefix.name
    manifest = read_json(path)
    try:
        facts = manifest["sources"][name]
        stated = (facts["documents"], facts["tokens"], facts["bytes"])
        found = (index.documents, index.tokens, sum(file.stat().st_size for file in pair_files(index.prefix)))
        idx = idx_path(index.prefix)
        if stated == found and idx.stat().st_mtime_ns <= path.stat().st_mtime_ns and spot_digest(idx) == facts["spot"]:
            return str(facts["sha256"][idx.name])
    except (OSError, LookupError, TypeError):
        pass
    return None

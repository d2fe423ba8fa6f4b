"""Which tokenizer a pair was built with, as the manifest beside it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.data.index.digest import SENTENCE_PIECE, tokenizer_files
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file, hash_files, read_json

_DECIDES = ("tokenizer.json", SENTENCE_PIECE)
"""Files of a tokenizer that decide alone which number stands for which text; others name marks and templates."""


@dataclass(frozen=True)
class _Made:
    """A tokenizer: who names it, its directory, and its SHA-256 as a manifest states it."""

    said_by: str
    directory: Path
    sha256: str

    def is_same(self, other: _Made) -> bool:
        """Whether both give every text the same tokens; one may have a chat template or another end mark more."""
        if self.sha256 == other.sha256:
            return True
        if any(one.sha256 != _sha256(one.directory) for one in (self, other)):
            return False  # what lies there now is not what the manifest speaks of
        pairs = ((self.directory / name, other.directory / name) for name in _DECIDES)
        return any(all(map(Path.is_file, pair)) and hash_file(pair[0]) == hash_file(pair[1]) for pair in pairs)

    def __str__(self) -> str:
        return f"{self.directory} (SHA-256 {self.sha256[:12]})"


def check_one_tokenizer(tokenizer: Path | None, pairs: Mapping[str, Path]) -> None:
    """Check that all pairs were built with one tokenizer, the given one where it is there.

    Pairs that no manifest of `octo data build` names, such as Megatron-LM's own, cannot be told and are let through.

    Args:
        tokenizer: directory that `data.tokenizer` names; None where nothing names one.
        pairs: prefixes by the field that names them.

    Raises:
        DataError: one was built with another tokenizer.
    """
    found = None
    if tokenizer is not None and (sha256 := _sha256(tokenizer)) is not None:
        found = _Made("data.tokenizer", tokenizer, sha256)
    manifests: dict[Path, Any] = {}
    for field, prefix in pairs.items():
        folder = prefix.parent
        if folder not in manifests:
            manifests[folder] = read_json(folder / "manifest.json")
        try:
            stated = manifests[folder]["tokenizer"] if prefix.name in manifests[folder]["sources"] else None
            made = stated and _Made(field, folder / stated["directory"], str(stated["sha256"]))
        except (LookupError, TypeError):
            continue  # a manifest of somebody else
        if made and found and not made.is_same(found):
            named = found.said_by == "data.tokenizer"
            raise DataError(
                f"{field} ({prefix}) was built with the tokenizer {made}, and {found.said_by} is "
                f"{'' if named else 'of '}{found}",
                "a number stands for another piece of text in each: the model would read one as the other",
                (f"set data.tokenizer to {made.directory}, or " if named else "")
                + f"build the data with {found.directory}",
            )
        found = found or made


def _sha256(directory: Path) -> str | None:
    """What `tokenizer.sha256` of a manifest would be for this tokenizer; None where there is none."""
    files = tokenizer_files(directory) if directory.is_dir() else []
    return hash_files(files) if files else None

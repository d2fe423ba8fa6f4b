"""Which tokenizer a pair was built with, as the manifest beside it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_octo.data.index.digest import token_rules
from megatron_octo.data.mix.identity import manifest_of
from megatron_octo.errors import DataError


@dataclass(frozen=True)
class _Made:
    """A tokenizer: who names it, its directory, and its `token_rules`."""

    said_by: str
    directory: Path
    rules: str

    def __str__(self) -> str:
        return f"{self.directory} (SHA-256 {self.rules[:12]})"


def check_one_tokenizer(tokenizer: Path | None, pairs: Mapping[str, Path]) -> None:
    """Check that all pairs were built with one tokenizer, the given one where it is there.

    Pairs that no manifest of a build speaks of, such as Megatron-LM's own, cannot be told and are let through.

    Args:
        tokenizer: directory that `data.tokenizer` names; None where nothing names one.
        pairs: prefixes by the field that names them.

    Raises:
        DataError: one was built with another tokenizer.
    """
    rules = None if tokenizer is None else token_rules(tokenizer)
    found = _Made("data.tokenizer", tokenizer, rules) if tokenizer is not None and rules else None
    for field, prefix in pairs.items():
        made = _made_with(field, prefix)
        if made and found and made.rules != found.rules:
            of = "" if found.said_by == "data.tokenizer" else "of "
            raise DataError(
                f"{field} ({prefix}) was built with the tokenizer {made}, and {found.said_by} is {of}{found}",
                "a number stands for another piece of text in each: the model would read one as the other",
                _fix(made, found),
            )
        found = found or made


def _made_with(field: str, prefix: Path) -> _Made | None:
    manifest = manifest_of(prefix)
    try:
        stated = manifest["tokenizer"]  # type: ignore[index]
        return _Made(field, prefix.parent / stated["directory"], str(stated["rules"]))
    except (LookupError, TypeError):
        return None  # none, or somebody else's


def _fix(made: _Made, found: _Made) -> str:
    """What lies where the manifest says may be another tokenizer by now, or gone."""
    if found.said_by == "data.tokenizer" and token_rules(made.directory) == made.rules:
        return f"set data.tokenizer to {made.directory}, or build the data with {found.directory}"
    if made.directory.resolve() == found.directory.resolve():
        return f"{made.directory} was altered since: restore it, as octo data verify {made.directory.parent} tells"
    return f"build the data with {found.directory}"

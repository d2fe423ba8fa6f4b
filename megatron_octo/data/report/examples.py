"""What was left out beside what it equals: the document kept instead, or the question that it gives away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_octo.config.clean import Benchmark
from megatron_octo.data.clean.questions import benchmark_file, read_questions
from megatron_octo.data.clean.removals import EXACT, NEAR, SHOWN, excerpt_of
from megatron_octo.data.index.encode import Encoder
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.index.table import DocumentTable, docs_path
from megatron_octo.errors import OctoError
from megatron_octo.files import hash_file

_TOKENS = SHOWN  # decoded of a document that was kept: a token is a character or more


class Others:
    """Finds the texts that removals name as their reason.

    Args:
        out: data directory.
        manifest: of it.
        encoder: of it.
    """

    def __init__(self, out: Path, manifest: dict[str, Any], encoder: Encoder) -> None:
        self._out, self._manifest, self._encoder = out, manifest, encoder
        self._questions: dict[str, dict[str, str] | str] = {}

    def beside(self, removal: dict[str, Any]) -> dict[str, Any]:
        """A removal with `equals`: the other text; None with `absent`, why it is not shown."""
        same = removal["reason"] in (EXACT, NEAR)
        text, why = self._document(removal["other"]) if same else self._question(removal["other"])
        return {**removal, "equals": text, "absent": why}

    def _document(self, name: str) -> tuple[str | None, str | None]:
        corpus = name.partition("/")[0]
        if corpus not in self._manifest["sources"]:
            return None, f"{corpus} is no source of this directory"
        place = DocumentTable(docs_path(self._out / corpus)).find(name)
        if place is None:
            return None, "it lies beyond the token budget of its corpus"
        tokens = read_index(self._out / corpus, checked=True).document(place)
        marks = (self._encoder.begin, self._encoder.end)
        text = self._encoder.decode([token for token in tokens[:_TOKENS].tolist() if token not in marks])
        return excerpt_of(text, SHOWN), None

    def _question(self, name: str) -> tuple[str | None, str | None]:
        benchmark = name.partition("/")[0]
        if benchmark not in self._questions:
            self._questions[benchmark] = self._read(benchmark)
        found = self._questions[benchmark]
        if isinstance(found, str):
            return None, found
        return (found[name], None) if name in found else (None, "the benchmark's file has no such problem")

    def _read(self, name: str) -> dict[str, str] | str:
        """Questions of a benchmark by id, or why they cannot be shown."""
        against = (self._manifest["settings"].get("decontaminate") or {}).get("against", {})
        if name not in against:
            return "the settings name no such benchmark"
        try:
            benchmark = Benchmark(**against[name])
            path = benchmark_file(name, benchmark)
            known = self._manifest["inputs"].get(f"decontaminate.against.{name}", {})
            if path is None or path.name not in known:
                return "the benchmark's file is not here"
            if hash_file(path) != known[path.name]["sha256"]:
                return "the benchmark's file has changed since the build"
            return {question.id: question.text for question in read_questions(name, benchmark) or []}
        except (OctoError, OSError, ValueError):
            return "the benchmark's file is not here"

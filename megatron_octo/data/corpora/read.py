"""Shards -> documents, with an account of every record that was read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from datatrove.data import Document

from megatron_octo.config.data import Inputs
from megatron_octo.data.corpora.lines import numbered_lines, parse_line, text_of
from megatron_octo.data.corpora.problems import build_world, heldout_questions
from megatron_octo.data.corpora.registry import Adapter, Field, adapter_of
from megatron_octo.data.corpora.render import BadRecord, Unsuitable, as_is, restyled, same_question
from megatron_octo.data.corpora.rows import numbered_rows
from megatron_octo.data.corpora.shard import Shard, is_parquet
from megatron_octo.errors import DataError

_NAMED = 20
HELDOUT = "heldout"


@dataclass
class Accounts:
    """What became of every record: `read == documents + sum(skipped.values()) + sum(removed.values())`.

    Args:
        read: records.
        documents: those that became documents.
        skipped: those that are damaged or that their corpus's own rule leaves out, by reason.
        first: the first damaged ones, `file:line: reason`; at most 20.
        removed: sound documents left out, by reason: `exact_duplicate`, `near_duplicate`, `leak`, `heldout`.
    """

    read: int = 0
    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Accounts) -> Accounts:
        def both(name: str) -> dict[str, int]:
            mine, theirs = getattr(self, name), getattr(other, name)
            return {key: mine.get(key, 0) + theirs.get(key, 0) for key in sorted({*mine, *theirs})}

        return Accounts(
            self.read + other.read,
            self.documents + other.documents,
            both("skipped"),
            [*self.first, *other.first][:_NAMED],
            both("removed"),
        )

    def skip(self, reason: str, documents: int = 0) -> None:
        """Count a record that became no document, or documents that proved to be none."""
        self.skipped[reason] = self.skipped.get(reason, 0) + (documents or 1)
        self.documents -= documents

    def remove(self, reason: str, documents: int = 0) -> None:
        """Count a sound record that is left out, or documents that are."""
        self.removed[reason] = self.removed.get(reason, 0) + (documents or 1)
        self.documents -= documents

    def as_json(self) -> dict[str, Any]:
        """For a record or a manifest; `Accounts(**facts)` reads it back."""
        return asdict(self)


class ShardReader:
    """The documents of one shard, in the order of its file, the same ones at every reading.

    Ids read `<corpus>/<file>:<line or row from 1>`; generated text has `<kind>:<number>`. Memory for one record, or
    for some rows of a parquet file. Iterating again reads again.

    Args:
        config: the build.
        shard: what to read.
        keep: fields of the records, by their names in the files, that go into the documents' metadata where they are.

    Raises:
        DataError: on reading, a file that cannot be read, or a damaged record under the strict rule.
        ConfigError: the corpus's adapter or its fields are not what they can be.
    """

    def __init__(self, config: Inputs, shard: Shard, keep: Sequence[str] = ()) -> None:
        self._config, self._shard, self._keep = config, shard, keep
        self.accounts = Accounts()

    def __iter__(self) -> Iterator[Document]:
        self.accounts = Accounts()
        return self._generated() if self._shard.corpus in self._config.world.tokens else self._read()

    def _generated(self) -> Iterator[Document]:
        kind = self._shard.corpus
        for number, text in enumerate(build_world(self._config).documents(kind, sys.maxsize), start=1):
            self.accounts.read += 1
            self.accounts.documents += 1
            yield Document(text, f"{kind}:{number}")

    def _read(self) -> Iterator[Document]:
        shard, accounts = self._shard, self.accounts
        adapter = adapter_of(self._config, shard.corpus)
        names = self._config.corpora[shard.corpus].fields
        parse, text_of_record = self._parse(adapter, names), self._text(adapter, names)
        asks_heldout = self._asks_heldout(adapter, names)
        prefix = f"{shard.corpus}/{shard.name}:"
        for number, raw in self._records(adapter, names):
            accounts.read += 1
            try:
                record = parse(raw)
                text = text_of_record(record)
            except BadRecord as problem:
                self._damaged(number, problem)
            except Unsuitable as rule:
                accounts.skip(str(rule))
            else:
                if asks_heldout is not None and asks_heldout(record):
                    accounts.remove(HELDOUT)
                    continue
                accounts.documents += 1
                kept = {name: record[name] for name in self._keep if name in record}
                yield Document(text, f"{prefix}{number}", metadata=kept)

    def _text(self, adapter: Adapter, names: dict[str, str]) -> Callable[[dict[str, Any]], str]:
        """Makes the text of a record, in the form its corpus is asked for."""
        text, rendering = _call(adapter, adapter.render, names), self._config.corpora[self._shard.corpus].rendering
        if rendering == "published" or adapter.question is None:
            return text
        question = _call(adapter, adapter.question, names)
        return lambda record: restyled(text(record), question(record), rendering)

    def _asks_heldout(self, adapter: Adapter, names: dict[str, str]) -> Callable[[dict[str, Any]], bool] | None:
        """Whether a record asks a question that nothing may be trained on; None where it cannot."""
        if adapter.question is None or self._config.problems.heldout is None:
            return None
        heldout = heldout_questions(self._config)
        question = _call(adapter, adapter.question, names)
        return lambda record: same_question(question(record)) in heldout

    def _records(self, adapter: Adapter, names: dict[str, str]) -> Iterator[tuple[int, Any]]:
        shard = self._shard
        assert shard.first is not None, f"{shard.path}: nobody has counted its lines"
        if is_parquet(shard.path):
            required = [names.get(item.name, item.name) for item in adapter.fields if not item.optional]
            optional = [names.get(item.name, item.name) for item in adapter.fields if item.optional]
            optional += [name for name in self._keep if name not in (*required, *optional)]
            return numbered_rows(shard.path, required, optional, shard.part, shard.first)
        return numbered_lines(shard.path, shard.part, shard.first)

    def _parse(self, adapter: Adapter, names: dict[str, str]) -> Callable[[Any], dict[str, Any]]:
        if is_parquet(self._shard.path):
            return _row
        own = [names.get(item.name, item.name) for item in adapter.fields]
        return partial(parse_line, keys=tuple((name, f'"{name}"'.encode()) for name in own))

    def _damaged(self, number: int, problem: BadRecord) -> None:
        shard = self._shard
        if self._config.on_bad_line == "strict":
            what = "row" if is_parquet(shard.path) else "line"
            raise DataError(
                f"{shard.path}, {what} {number}: {problem}",
                f"every record of corpora.{shard.corpus} must have the fields of its adapter",
                "mend it, or set on_bad_line: skip",
            )
        self.accounts.skip(problem.kind)
        if len(self.accounts.first) < _NAMED:
            self.accounts.first.append(f"{shard.name}:{number}: {problem}")


def _row(row: dict[str, Any] | BadRecord) -> dict[str, Any]:
    if isinstance(row, BadRecord):
        raise row
    return row


def _call(adapter: Adapter, function: Callable[..., str], names: dict[str, str]) -> Callable[[dict[str, Any]], str]:
    """A function of an adapter's fields as a function of a record, which is checked."""
    fields = [(names.get(item.name, item.name), item) for item in adapter.fields]
    if function is as_is:
        name = fields[0][0]
        return lambda record: text_of(record, name)
    return lambda record: _without_nul(function(*[_value(record, name, item) for name, item in fields]))


def _without_nul(text: str) -> str:
    if "\0" in text:  # of a list or a turn, which nothing has looked at
        raise BadRecord("the document holds a NUL character")
    return text


def _value(record: dict[str, Any], name: str, item: Field) -> Any:
    if item.optional:
        return record.get(name)
    if item.text:
        return text_of(record, name)
    if record.get(name) is None:
        raise BadRecord(f"field {name!r} is null" if name in record else f"no field {name!r}")
    return record[name]


def batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Documents in lists of about so many characters, so that memory does not follow from how long each is."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

"""Text -> tokens under the build's own rules, whatever a tokenizer's files would add or read into a text."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.index.pairs import token_dtype
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file

_BATCH = 512
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_THREADS = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Batch:
    """Documents as they are stored.

    Args:
        content: tokens of all documents, marks included.
        lengths: tokens of each document; 0 for one whose text has none.
        counts: how often each token occurs, int64 [rows].
    """

    content: bytes
    lengths: list[int]
    counts: np.ndarray


class Encoder(ABC):
    """A tokenizer under the rules of an `IndexConfig`.

    Args:
        path: of its file, for messages.
        entries: of the tokenizer: what Megatron-LM calls its size.
        rows: largest token id plus 1: the embedding needs at least as many.
        control: token ids that no text may become, by the text of the mark; empty where marks in texts are meant.
        begin: token before each document, or None.
        end: token after each document, or None.
    """

    def __init__(
        self, path: Path, entries: int, rows: int, control: dict[str, int], begin: int | None, end: int | None
    ) -> None:
        self.path, self.vocabulary, self.rows = path, entries, rows
        self.begin, self.end = begin, end
        self.dtype = token_dtype(entries, rows)
        """Type of a stored token."""
        self._begin, self._end = (self._stored([] if mark is None else [mark]) for mark in (begin, end))
        self._control = np.array(sorted(control.values()), np.int64)
        self._marks = sum(mark in control.values() for mark in (begin, end))
        self._refuse_marks_in_texts(control)

    def encode(self, texts: list[str]) -> Batch:
        """Encode documents: tokens of each text between the marks of the rules.

        Raises:
            ControlToken: a text became a control token although the rules say that it stays text.
        """
        size, begin, end = self.dtype.itemsize, self._begin, self._end
        with _one_thread():
            stored = [begin + tokens + end if tokens else b"" for tokens in self._texts(texts)]
        content = b"".join(stored)
        counts = np.bincount(np.frombuffer(content, self.dtype), minlength=self.rows)
        documents = sum(map(bool, stored))
        if len(self._control) and counts[self._control].sum() != self._marks * documents:
            raise ControlToken(*self._first_control_token(stored))
        return Batch(content, [len(tokens) // size for tokens in stored], counts)

    def documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Encode documents in order, marks included."""
        texts = iter(texts)
        while batch := list(islice(texts, _BATCH)):
            found = self.encode(batch)
            tokens, first = np.frombuffer(found.content, self.dtype).tolist(), 0
            for length in found.lengths:
                yield tokens[first : first + length]
                first += length

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, control tokens shown."""

    @property
    @abstractmethod
    def added_by_itself(self) -> list[str]:
        """Marks that the tokenizer's own files would put around a text; the rules decide, and these are left out."""

    @abstractmethod
    def _texts(self, texts: list[str]) -> list[bytes]:
        """Tokens of each text as they are stored, without marks."""

    def _stored(self, tokens: list[int]) -> bytes:
        return np.array(tokens, self.dtype).tobytes()

    def _refuse_marks_in_texts(self, control: dict[str, int]) -> None:
        """Some tokenizers cannot keep a mark as text; that is told before the first document."""
        if not control:
            return
        is_control = np.zeros(self.rows, bool)
        is_control[self._control] = True
        with _one_thread():
            found = self._texts(list(control))
        for mark, tokens in zip(control, found, strict=True):
            if is_control[np.frombuffer(tokens, self.dtype)].any():
                raise DataError(
                    f"{self.path}: '{mark}' written in a text becomes a control token",
                    "index.special_tokens = text says that it stays text, which this tokenizer cannot do",
                    "set index.special_tokens: control, or use another tokenizer",
                )

    def _first_control_token(self, stored: list[bytes]) -> tuple[int, int]:
        for place, tokens in enumerate(stored):
            inside = tokens[len(self._begin) : len(tokens) - len(self._end)]
            ids = np.frombuffer(inside, self.dtype)
            if (found := ids[np.isin(ids, self._control)]).size:
                return place, int(found[0])
        raise AssertionError("the counts show a control token that no document holds")


class ControlToken(Exception):
    """A text became a control token: `place` in the batch, and the token's id."""

    def __init__(self, place: int, token: int) -> None:
        self.place, self.token = place, token
        super().__init__(f"text {place} holds control token {token}")


_kept: dict[tuple[str, IndexConfig], Encoder] = {}


def load_encoder(path: Path, index: IndexConfig | None = None) -> Encoder:
    """Open a tokenizer, or give the one this process opened last if its files and the rules are the same.

    A worker comes here for every shard; a tokenizer of 128,000 entries takes half a second to open, and its table of
    words is worth keeping.

    Args:
        path: a directory with `tokenizer.json` or `tokenizer.model`, or a SentencePiece `.model` file.
        index: the rules; their defaults where None.

    Raises:
        DataError: a file is missing or damaged, no end mark is named where the rules want one, or the tokenizer
            cannot keep to the rules.
    """
    index = index or IndexConfig()
    files = [path] if path.is_file() else [path / name for name in _FILES]
    key = " ".join(hash_file(file) if file.is_file() else "-" for file in files), index
    if key not in _kept:
        _kept.clear()
        _kept[key] = open_encoder(path, index)
    return _kept[key]


def open_encoder(path: Path, index: IndexConfig) -> Encoder:
    """Open a tokenizer, see `load_encoder`, and do not keep it."""
    from megatron_octo.data.index.hugging_face import HuggingFaceEncoder
    from megatron_octo.data.index.sentence_piece import SentencePieceEncoder

    model = path if path.suffix == ".model" else path / "tokenizer.model"
    if model.is_file() and not (path / "tokenizer.json").is_file():
        return SentencePieceEncoder(model, index)
    return HuggingFaceEncoder(path, index)


def vocabulary_of(path: Path) -> int:
    """Rows an embedding needs at least for a tokenizer, added tokens included.

    Raises:
        DataError: there is no readable tokenizer.
    """
    return open_encoder(path, IndexConfig(eos="none", special_tokens="control")).rows


def settings_of(directory: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = directory / "tokenizer_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason: object = "it is no JSON object"
    except (OSError, ValueError) as error:
        reason = error
    raise DataError(f"{path} cannot be read ({reason})", "it names the end-of-text token", "restore the file")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tokenise in this thread alone: a worker is one core, and threads of several workers would fight for it.

    The library looks at the environment at every call, but keeps the threads it once started.
    """
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(_THREADS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

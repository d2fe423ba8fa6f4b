"""SentencePiece `.model` files."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.index.encode import Encoder
from megatron_octo.errors import DataError, EnvironmentProblem


class SentencePieceEncoder(Encoder):
    """A SentencePiece model under the same rules as a Hugging Face tokenizer.

    Its control symbols are the marks: SentencePiece itself keeps them as text; where the rules mean them, texts are cut
    there. Symbols of its user-defined kind are vocabulary like any other.

    Args:
        path: of the model file.
        index: the rules.

    Raises:
        DataError: see `load_encoder`.
        EnvironmentProblem: sentencepiece is not installed.
    """

    def __init__(self, path: Path, index: IndexConfig) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise EnvironmentProblem(f"{path} needs sentencepiece", fix="pip install sentencepiece") from None
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # bare RuntimeError, TypeError or OSError of the C++ side
            raise DataError(f"{path} is not a SentencePiece model ({error})", fix="restore the file") from None
        rows = self._model.get_piece_size()
        marks = {self._model.id_to_piece(i): i for i in range(rows) if self._model.is_control(i)}
        begin = self._mark(path, "bos", self._model.bos_id(), None) if index.bos == "before_document" else None
        end = self._mark(path, "eos", self._model.eos_id(), index.eos_token) if index.eos == "after_document" else None
        control = index.special_tokens == "control"
        self._marks_in_texts = dict(marks) if control else {}
        self._border = re.compile(f"({'|'.join(map(re.escape, marks))})") if control and marks else None
        # a mark of another kind may come from a text, and may not
        marks |= {self._model.id_to_piece(mark): mark for mark in (begin, end) if mark is not None}
        super().__init__(path, rows, rows, {} if control else marks, begin, end)

    def decode(self, tokens: list[int]) -> str:
        """See `Encoder.decode`."""
        shown, plain = "", []
        for token in tokens:
            if self._model.is_control(token):
                shown += self._model.decode(plain) + self._model.id_to_piece(token)
                plain = []
            else:
                plain.append(token)
        return shown + self._model.decode(plain)

    @property
    def added_by_itself(self) -> list[str]:
        """See `Encoder.added_by_itself`."""
        return []

    def _texts(self, texts: list[str]) -> list[bytes]:
        if self._border is None:
            return [self._stored(ids) for ids in self._model.encode(texts, out_type=int, num_threads=1)]
        return [self._stored(self._cut(text)) for text in texts]

    def _cut(self, text: str) -> list[int]:
        assert self._border is not None
        tokens: list[int] = []
        for part in self._border.split(text):
            if part in self._marks_in_texts:
                tokens.append(self._marks_in_texts[part])
            elif part:
                tokens += self._model.encode(part, out_type=int)
        return tokens

    def _mark(self, path: Path, name: str, number: int, text: str | None) -> int:
        if text is not None:
            number = self._model.piece_to_id(text)
            if self._model.id_to_piece(number) != text:
                number = -1
        if number < 0:
            raise DataError(
                f"{path}: it has no {name} token" + (f" {text!r}" if text else ""),
                f"index.{name} asks for one at every document",
                "name it in index.eos_token, or set index.eos: none" if name == "eos" else "set index.bos: none",
            )
        return number

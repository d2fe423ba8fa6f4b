"""Tokenizers in Hugging Face form, without importing transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.index.encode import Encoder, settings_of
from megatron_octo.data.index.pairs import token_dtype
from megatron_octo.data.index.words import MODEL_SETTINGS, WordEncoder
from megatron_octo.errors import DataError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer


class HuggingFaceEncoder(Encoder):
    """A directory with `tokenizer.json`, and `tokenizer_config.json` for the names of its marks.

    Args:
        directory: of the tokenizer.
        index: the rules.

    Raises:
        DataError: see `load_encoder`.
    """

    def __init__(self, directory: Path, index: IndexConfig) -> None:
        path = directory / "tokenizer.json"
        self._tokenizer = _load(path)
        self._tokenizer.encode_special_tokens = index.special_tokens == "text"
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        begin = self._mark(directory, "bos_token", None) if index.bos == "before_document" else None
        end = self._mark(directory, "eos_token", index.eos_token) if index.eos == "after_document" else None
        control = {}
        if index.special_tokens == "text":
            own = {self._tokenizer.id_to_token(mark): mark for mark in (begin, end) if mark is not None}
            _make_special(self._tokenizer, own)
            control = _special_tokens(path, form_of(self._tokenizer)) | own
        form = form_of(self._tokenizer)
        entries, rows = len(ids), max(ids.values()) + 1
        self._words = WordEncoder.of(self._tokenizer, form, token_dtype(entries, rows), index.special_tokens == "text")
        super().__init__(path, entries, rows, control, begin, end)

    def decode(self, tokens: list[int]) -> str:
        """See `Encoder.decode`."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    @property
    def added_by_itself(self) -> list[str]:
        """See `Encoder.added_by_itself`."""
        return self._tokenizer.encode("", add_special_tokens=True).tokens

    def _texts(self, texts: list[str]) -> list[bytes]:
        if self._words is not None:
            return [self._words.encode(text) for text in texts]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._stored(encoding.ids) for encoding in found]

    def _mark(self, directory: Path, name: str, text: str | None) -> int:
        if text is None:
            named = settings_of(directory).get(name)
            text = named.get("content") if isinstance(named, dict) else named
        number = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        if number is None:
            where, end = directory / "tokenizer_config.json", name == "eos_token"
            raise DataError(
                f"{where}: {name} = {text!r} is not in the tokenizer",
                "every document ends with it" if end else "index.bos asks for it before every document",
                "name it in index.eos_token, or set index.eos: none" if end else "set index.bos: none",
            )
        return number


def form_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides how a tokenizer cuts a text, in the words of its file, without its vocabulary."""
    model = tokenizer.model
    steps = {name: getattr(tokenizer, name) for name in ("normalizer", "pre_tokenizer")}
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {
        **{name: json.loads(step.__getstate__()) if step is not None else None for name, step in steps.items()},
        "model": {"type": type(model).__name__, **{name: getattr(model, name, None) for name in MODEL_SETTINGS}},
        "added_tokens": [{"id": number, **_plain(token)} for number, token in added],
    }


def _plain(token: AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in ("content", "special", "lstrip", "rstrip", "single_word")}


def _make_special(tokenizer: Tokenizer, marks: dict[str, int]) -> None:
    """Treat marks as special that a file merely adds: only special tokens are not cut out of a text."""
    from tokenizers import AddedToken

    added = tokenizer.get_added_tokens_decoder()
    plain = [text for text, number in marks.items() if number in added and not added[number].special]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in plain])


def _special_tokens(path: Path, form: dict[str, Any]) -> dict[str, int]:
    """Marks by their text; the unknown token is none of them, for unknown text does become it."""
    unknown = form["model"]["unk_token"]
    if form["model"]["type"] == "Unigram":  # the library does not say which it is
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        unknown = None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    added = [token for token in form["added_tokens"] if token["special"] and token["content"] != unknown]
    return {token["content"]: token["id"] for token in added}


def _load(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise DataError(
            f"{path} does not exist",
            "a tokenizer directory holds tokenizer.json and tokenizer_config.json, or tokenizer.model",
            "name another directory, or convert it: AutoTokenizer.from_pretrained(old).save_pretrained(new)",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises a bare Exception
        raise DataError(f"{path} is not a tokenizer ({error})", fix="restore the file") from None

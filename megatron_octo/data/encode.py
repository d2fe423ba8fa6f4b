"""Text -> tokens with a tokenizer directory in Hugging Face form, without importing transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.errors import DataError
from megatron_octo.files import hash_file, hash_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                   "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")  # fmt: skip
_BATCH = 512


class Encoder:
    """A tokenizer that turns documents into tokens with one end mark each.

    Marks written in a text, such as `<|end_of_text|>`, stay text: only the end mark added here is a control token.

    Args:
        directory: holds `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        DataError: a file is missing or damaged, or no end-of-text token is named.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = _load(directory)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary = _rows(self._tokenizer)
        self.end = _end_token(directory, self._tokenizer)

    def documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Encode documents in order: tokens of the text and one end mark; no begin mark."""
        texts = iter(texts)
        while batch := list(islice(texts, _BATCH)):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield [*encoding.ids, self.end]

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, control tokens shown."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def tokenizer_digest(directory: Path) -> str | None:
    """SHA-256 over the files of a tokenizer, wherever it lies; None where there is none."""
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not (directory / TOKENIZER_FILES[0]).is_file():
        return None
    return hash_json({path.name: hash_file(path) for path in files})


def vocabulary_of(directory: Path) -> int:
    """Entries of a tokenizer, added tokens included: the embedding needs at least as many rows.

    Raises:
        DataError: there is no readable `tokenizer.json`.
    """
    return _rows(_load(directory))


def _rows(tokenizer: Tokenizer) -> int:
    """One more than the highest id: there may be gaps, and fewer entries than that."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _load(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist",
            "a tokenizer directory holds tokenizer.json and tokenizer_config.json",
            "name another directory, or convert it: AutoTokenizer.from_pretrained(old).save_pretrained(new)",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises a bare Exception
        raise DataError(f"{path} is not a tokenizer ({error})", fix="restore the file") from None


def _end_token(directory: Path, tokenizer: Tokenizer) -> int:
    path = directory / "tokenizer_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error})", "it names the end-of-text token", "restore the file"
        ) from None
    text = named.get("content") if isinstance(named, dict) else named
    number = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if number is None:
        raise DataError(f"{path}: eos_token = {text!r} is not in the tokenizer", "every document ends with it")
    return number

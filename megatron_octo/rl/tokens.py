"""A model directory's tokenizer as far as this stage needs it: special texts and lengths, without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.errors import DataError


@dataclass(frozen=True)
class SpecialTexts:
    """A tokenizer, read from `tokenizer.json` alone: importing transformers costs seconds this needs not.

    Args:
        bos: text of the token that begins a text, if there is one.
        ends: texts of the tokens that end a response, as generation uses them.
        pad: text of the padding token; the end token's where there is none, as in OpenRLHF.
        tokenizer: of the `tokenizers` package.
    """

    bos: str | None
    ends: tuple[str, ...]
    pad: str | None
    tokenizer: Any

    def length(self, text: str) -> int:
        """Tokens of a text, no special ones added."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def read_tokenizer(model: Path) -> SpecialTexts:
    """Read the tokenizer of a model directory.

    Raises:
        DataError: it is missing or damaged, or names no token that ends a response.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        settings = _json(model / "tokenizer_config.json")
        generation = _json(model / "generation_config.json")
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{model}: its tokenizer cannot be read ({error})", fix="convert the model again") from None
    own = _text(settings.get("eos_token"))
    ids = generation.get("eos_token_id")
    texts = [
        tokenizer.id_to_token(number) for number in (ids if isinstance(ids, list) else [ids]) if number is not None
    ]
    ends = tuple(text for text in texts or [own] if text)
    if not ends:
        raise DataError(f"{model}: names no end-of-text token", "a response could never stop", "set eos_token_id")
    return SpecialTexts(_text(settings.get("bos_token")), ends, _text(settings.get("pad_token")) or ends[0], tokenizer)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _text(token: object) -> str | None:
    """The text of a special token as tokenizer_config.json writes it: plain, or an object with `content`."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None

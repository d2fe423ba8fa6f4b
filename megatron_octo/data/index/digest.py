"""What tells one tokenizer or one large file from another, wherever it lies, and which tokens are of no tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_octo.files import hash_file, hash_json

SENTENCE_PIECE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", SENTENCE_PIECE,
                   "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")  # fmt: skip
"""Files of a tokenizer directory in Hugging Face form that say how text becomes tokens."""

_STRETCHES, _STRETCH = 64, 4096


def tokenizer_digest(directory: Path) -> str | None:
    """SHA-256 over the files of a tokenizer, wherever it lies; None where there is none."""
    if not (directory / TOKENIZER_FILES[0]).is_file():
        return None
    return hash_json({path.name: hash_file(path) for path in tokenizer_files(directory)})


def token_rules(directory: Path) -> str | None:
    """SHA-256 of what decides alone which tokens a text becomes; None where there is no tokenizer that can be read.

    Of a `tokenizer.json` these are its model, its added tokens and how it cuts a text, however the library wrote
    them; of SentencePiece, which is read where there is no `tokenizer.json`, the `.model`. Chat templates, names
    of marks and padding decide nothing.
    """
    form, model = directory / TOKENIZER_FILES[0], directory / SENTENCE_PIECE
    try:
        if form.is_file():
            rules = _rules(orjson.loads(form.read_bytes()))
            return hashlib.sha256(orjson.dumps(rules, option=orjson.OPT_SORT_KEYS)).hexdigest()
        return hash_file(model) if model.is_file() else None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def _rules(form: dict[str, Any]) -> dict[str, Any]:
    """Older libraries join the two pieces of a merge by a space, and leave out settings that are off."""
    model = {name: value for name, value in form["model"].items() if value is not None and value is not False}
    if "merges" in model:
        model["merges"] = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    return {"model": model, **{name: form.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer")}}


def tokenizer_files(path: Path) -> list[Path]:
    """The files that a tokenizer is, by name: of its directory what says how text becomes tokens, or one file."""
    if path.is_file():
        return [path]
    return [path / name for name in sorted(TOKENIZER_FILES) if (path / name).is_file()]


def spot_digest(path: Path) -> str:
    """SHA-256 of 64 stretches of 4 KiB from all over a file: of other content, or with a hole from a copy in part."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for number in range(_STRETCHES):
            file.seek(max(0, size - _STRETCH) * number // (_STRETCHES - 1))
            digest.update(file.read(_STRETCH))
    return digest.hexdigest()


def stray_token(tokens: np.ndarray, vocabulary: int) -> int | None:
    """A token that is no row of the model's embedding, too large or below 0; None if there is none."""
    if not len(tokens):
        return None
    largest, smallest = int(tokens.max()), int(tokens.min())
    return largest if largest >= vocabulary else smallest if smallest < 0 else None

"""Prompts, and what makes two questions the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.config.curate import Question
from megatron_octo.config.recipes import packaged
from megatron_octo.errors import ConfigError

PLACE = "{text}"


@dataclass(frozen=True)
class Asked:
    """A prompt with its model and settings: everything an answer follows from besides the document.

    Args:
        prompt: the prompt's text, with `{text}` where the document goes.
        limit: characters of a document that are sent.
        settings: fields of the request besides the messages.
    """

    prompt: str
    limit: int
    settings: dict[str, Any]

    def message(self, text: str) -> str:
        """What is sent about a document."""
        return self.prompt.replace(PLACE, text[: self.limit])

    def request(self, message: str) -> dict[str, Any]:
        """The body of a request."""
        return {**self.settings, "messages": [{"role": "user", "content": message}]}

    def key(self, message: str) -> str:
        """A hash of document, prompt, model and settings, hexadecimal: the name of the answer."""
        digest = hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=16)
        digest.update(b"\0" + message.encode())
        return digest.hexdigest()

    def as_json(self) -> dict[str, Any]:
        """For records and the manifest; the prompt as its hash."""
        prompt = hashlib.sha256(self.prompt.encode()).hexdigest()
        return {"prompt_sha256": prompt, "input_characters": self.limit, **self.settings}


def asked_of(question: Question, model: str, field: str) -> Asked:
    """Read a question's prompt and put it together with its settings.

    Args:
        question: from the configuration.
        model: name of the model.
        field: where the question stands, for messages.

    Raises:
        ConfigError: the prompt is missing, unreadable, or does not say once where the document goes.
    """
    path = Path(question.prompt)
    path = path if path.exists() else packaged(path) or path
    try:
        prompt = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}.prompt: {path} cannot be read ({error})", fix="name a text file") from None
    if prompt.count(PLACE) != 1:
        raise ConfigError(
            f"{field}.prompt: {path} holds {PLACE} {prompt.count(PLACE)} times",
            "the document is put in its place",
            "write it once",
        )
    sampling = question.model_dump(include={"temperature", "top_p", "max_tokens"})
    return Asked(prompt, question.input_characters, {"model": model, **sampling, **question.extra})

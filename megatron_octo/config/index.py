"""How documents become tokens: marks between them, and marks that are written in their texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Strict


class IndexConfig(Strict):
    """Rules that hold for every document, whatever the tokenizer's own files would add."""

    eos: Literal["after_document", "none"] = Field(
        default="after_document", description="one end mark after each document; none only where the texts hold it"
    )
    eos_token: str | None = Field(default=None, description="text of the end mark; by default the tokenizer's eos")
    bos: Literal["none", "before_document"] = Field(default="none", description="one begin mark before each document")
    special_tokens: Literal["text", "control"] = Field(
        default="text",
        description="what a mark written in a text becomes: text like any other, or the control token of that name",
    )

    @model_validator(mode="after")
    def _end_mark_used(self) -> IndexConfig:
        if self.eos == "none" and self.eos_token is not None:
            raise ValueError("eos_token names an end mark, but eos is none")
        return self

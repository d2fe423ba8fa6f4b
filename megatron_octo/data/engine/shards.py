"""What one task reads: until the readers cut files into shards, a source is one shard."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.jsonl import input_path


@dataclass(frozen=True)
class Shard:
    """A source as one shard; `path` is empty for generated text."""

    corpus: str
    number: int
    path: str


def list_shards(config: DataBuildConfig, corpus: str) -> list[Shard]:
    """The shards of a source."""
    if corpus in config.world.tokens:
        return [Shard(corpus, 0, "")]
    return [Shard(corpus, 0, str(input_path(config.corpora[corpus], f"corpora.{corpus}")))]

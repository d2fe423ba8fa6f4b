"""What one task reads: a file of a corpus, or a part of a large one."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_octo.config.data import Inputs
from megatron_octo.data.corpora.files import corpus_files
from megatron_octo.data.corpora.registry import adapter_of


@dataclass(frozen=True)
class Shard:
    """What one task reads; the same for any number of workers.

    Args:
        corpus: name in the build.
        number: place among the corpus's shards, in the order of its files.
        path: expanded path or URL; empty for generated text.
        part: bytes of a plain file of lines (whole lines), or row groups of a parquet file; None: the whole file.
        first: lines or rows of the file before it.
        name: of the file within its corpus, the same on every machine.
    """

    corpus: str
    number: int
    path: str
    part: tuple[int, int] | None = None
    first: int = 0
    name: str = ""


def is_parquet(path: str) -> bool:
    """Whether a file has rows and not lines."""
    return path.endswith(".parquet")


def list_shards(config: Inputs, corpus: str) -> list[Shard]:
    """The shards of a source.

    Args:
        config: the build.
        corpus: name of a corpus, or a kind of generated text: that is one endless shard.

    Raises:
        DataError: there are no files, or one of them is no corpus file.
        ConfigError: the corpus's adapter or its fields are not what they can be.
    """
    if corpus in config.world.tokens:
        return [Shard(corpus, 0, "")]
    adapter = adapter_of(config, corpus)
    files = corpus_files(config, corpus, adapter)
    return [Shard(corpus, number, path, name=name) for number, (name, path) in enumerate(files)]

"""Corpora of a few documents as the stages of the cleaning read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.clean.removals import Removal, read_removals
from megatron_octo.data.clean.stages import clean_stages
from megatron_octo.data.engine.executors import InProcess
from megatron_octo.data.engine.stage import run_stages


@dataclass(frozen=True)
class Held:
    """A shard that is its documents."""

    corpus: str
    number: int
    path: str
    texts: tuple[str, ...]


def read_held(shard: Held) -> list[Document]:
    """Its documents; module-level, so that it travels to other processes."""
    return [Document(text, f"{shard.path}:{line}") for line, text in enumerate(shard.texts, start=1)]


def shards_of(corpora: dict[str, list[list[str]]]) -> dict[str, list[Held]]:
    """Shards from texts: corpus -> shards -> documents."""
    return {
        name: [Held(name, number, f"{name}/{number}.jsonl", tuple(texts)) for number, texts in enumerate(shards)]
        for name, shards in corpora.items()
    }


def config_of(**changes: Any) -> DataBuildConfig:
    """A build of one corpus, with the given settings."""
    values = {"tokenizer": {"train": {"vocabulary_size": 300}}, "corpora": {"a": {"path": "a"}}, **changes}
    return parse_config(DataBuildConfig, values, "test")


def clean(corpora: dict[str, list[list[str]]], work: Path, executor: Any = None, **changes: Any) -> dict[str, Removal]:
    """Clean corpora; returns the removals by the document's id."""
    shards, found = shards_of(corpora), {}
    run_stages(clean_stages(config_of(**changes), shards, work, {}, read_held), work, executor or InProcess())
    for shard in (shard for several in shards.values() for shard in several):
        for place, removal in read_removals(work, shard).items():
            assert removal.place == place and removal.document == f"{shard.path}:{place + 1}"
            found[removal.document] = removal
    return found

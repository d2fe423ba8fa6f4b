"""The same items as questions with answers and as prose, whichever adapter reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.corpora.read import ShardReader
from megatron_octo.data.corpora.shard import list_shards
from megatron_octo.errors import ConfigError


@pytest.mark.parametrize(
    ("adapter", "record"),
    [
        ("openmathinstruct-2", {"problem": "How many\nare 2 + 3? ", "generated_solution": "Two and three.\n\nFive."}),
        ("qa", {"question": "How many\nare 2 + 3? ", "answer": "Two and three.\n\nFive."}),
    ],
)
def test_the_same_items_as_questions_and_as_prose(tmp_path: Path, adapter: str, record: dict[str, str]) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps(record) + "\n")

    def read(**more: str) -> str:
        corpus = {"adapter": adapter, "path": str(tmp_path / "items.jsonl"), **more}
        config = parse_config(DataBuildConfig, {"tokenizer": {"path": "t"}, "corpora": {"items": corpus}}, "build")
        [document] = ShardReader(config, list_shards(config, "items")[0])
        return document.text

    assert read(rendering="qa") == "Question: How many\nare 2 + 3?\nAnswer: Two and three.\n\nFive."
    assert read(rendering="prose") == "How many are 2 + 3? Two and three. Five."
    assert read() in ("How many\nare 2 + 3?\nTwo and three.\n\nFive.", read(rendering="qa"))
    with pytest.raises(ConfigError, match="rendering = 'prose' with adapter text"):
        (tmp_path / "items.jsonl").write_text('{"text": "a"}\n')
        read(adapter="text", rendering="prose")

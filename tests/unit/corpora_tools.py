"""Small corpora on disk, and readers of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import zstandard

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.corpora.read import Accounts, ShardReader
from megatron_octo.data.corpora.shard import Shard, list_shards, numbered
from megatron_octo.data.engine.inputs import hash_input, look_at


def config_of(corpora: dict[str, Any], **values: Any) -> DataBuildConfig:
    """A build of these corpora."""
    return parse_config(
        DataBuildConfig, {"tokenizer": {"train": {"vocabulary_size": 300}}, "corpora": corpora, **values}, "test"
    )


def shards_of(path: Path | str, **values: Any) -> list[Shard]:
    """The shards of corpus `c`."""
    return counted(list_shards(config_of({"c": {"path": str(path), **values}}), "c"))


def counted(shards: list[Shard]) -> list[Shard]:
    """Shards that know how many lines come before them, as the first stage of a build finds it."""
    unknown = {shard.path for shard in shards if shard.first is None}
    return numbered(shards, {path: hash_input(look_at(path))["lines"] for path in unknown})


def read(path: Path | str, policy: str = "strict", **values: Any) -> tuple[list[tuple[str, str]], Accounts]:
    """Id and text of every document of corpus `c`, and its accounts."""
    config = config_of({"c": {"path": str(path), **values}}, on_bad_line=policy)
    documents, accounts = [], Accounts()
    for shard in counted(list_shards(config, "c")):
        reader = ShardReader(config, shard)
        documents += [(document.id, document.text) for document in reader]
        accounts += reader.accounts
    return documents, accounts


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema | None = None, group: int = 2) -> Path:
    """A file of records in the form that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=group)
        return path
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path

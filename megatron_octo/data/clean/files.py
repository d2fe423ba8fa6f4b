"""Files without their duplicates and leaks: the cleaning of a build on its own, with records as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.clean.names import read_names
from megatron_octo.data.clean.questions import benchmark_file
from megatron_octo.data.clean.removals import read_removals, removals_path
from megatron_octo.data.clean.stages import SIGNATURES, clean_facts, clean_stages, compared, open_shard
from megatron_octo.data.clean.tasks import Cleaning, Part
from megatron_octo.data.corpora.files import input_path, unread_files
from megatron_octo.data.corpora.lines import numbered_lines, open_input
from megatron_octo.data.corpora.read import Accounts
from megatron_octo.data.corpora.render import BadRecord
from megatron_octo.data.corpora.rows import numbered_rows
from megatron_octo.data.corpora.shard import Shard, is_parquet, list_shards, numbered, refuse_shared_files
from megatron_octo.data.engine.build import claim, only_writer, refuse_other
from megatron_octo.data.engine.executors import executor_of
from megatron_octo.data.engine.inputs import (
    inputs_stage,
    lines_of,
    look_at,
    look_at_shards,
    refuse_change,
    tell_copies,
    tell_empty,
    tell_remote,
    versions,
)
from megatron_octo.data.engine.publish import (
    RESULT,
    REVISIONS,
    WORK,
    finish_publishing,
    keep_revisions,
    known_revisions,
    publish,
)
from megatron_octo.data.engine.stage import FILES, Stage, run_stages
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file, replacing

_WRITE = "write"
_LEVEL = 3
_REMOVALS = "removals.jsonl"


def clean_files(config: DataBuildConfig, out: Path, workers: int | None = None) -> dict[str, Any]:
    """Write the records of some corpora that are neither duplicates nor leaks.

    Killed at any moment, it goes on when called again; the result does not depend on the number of workers.

    Args:
        config: corpora, `deduplicate`, `decontaminate` and `on_bad_line` are what counts.
        out: directory to write: `<corpus>/<shard>.jsonl.zst`, `removals.jsonl`, `manifest.json` (last).
        workers: shards worked on at the same time, see `executor_of`.

    Returns:
        The manifest: `accounts` by corpus, `cleaning` and `not_read` as in the manifest of a build, `files` with hash.

    Raises:
        ConfigError: the directory holds another result, or a setting is not allowed.
        DataError: an input is missing or broken, changes meanwhile, or the result was altered.
        StageFailed: a worker process was killed.
    """
    out = out.absolute()
    revisions = known_revisions(out)
    shards = {name: list_shards(config, name, revisions) for name in config.corpora}
    refuse_shared_files(config, shards)
    not_read = unread_files(config, revisions)
    benchmarks = config.decontaminate.against.items() if config.decontaminate else ()
    paths = [shard.path for own in shards.values() for shard in own]
    paths += [str(path) for name, one in benchmarks if (path := benchmark_file(name, one))]
    heldout = config.problem_files.get("problems.heldout.file")
    paths += [str(input_path(heldout, "problems.heldout.file"))] if heldout else []
    look = {path: file for own in shards.values() for path, file in look_at_shards(own).items()}
    seen = [look.get(path) or look_at(path) for path in paths]
    own_files = {f"corpora.{name}": [look[path] for path in _paths(own)] for name, own in shards.items()}
    tell_remote(own_files, 4)
    tell_empty(own_files)
    with only_writer(out, [*config.corpora, _REMOVALS]) as lock, executor_of("local", workers, lock) as team:
        finish_publishing(out)
        finished, work, stage = claim(out, config), out / WORK, inputs_stage(seen)
        keep_revisions(out, revisions)
        facts = run_stages([stage], work, team)[stage.name]
        hashes = {file.path: found["sha256"] for file, found in zip(stage.tasks, facts, strict=True)}
        inputs = {path: hashes[path] for path in paths}
        if finished:
            refuse_other(out, "inputs", finished["inputs"], inputs)
            _verify(out, finished)
            shutil.rmtree(work)
            return finished
        content = {file.path: found for file, found in zip(stage.tasks, facts, strict=True)}
        read = {f"corpora.{name}": {path: content[path] for path in _paths(own)} for name, own in shards.items()}
        tell_copies(read, bool(config.deduplicate and config.deduplicate.exact))
        lines = lines_of(stage, facts)
        shards = {name: numbered(own, lines) for name, own in shards.items()}
        stages = clean_stages(config, shards, work, versions(seen, hashes))
        found = run_stages([*stages, _writing(config, work, stages)], work, team)
        for file in seen:
            refuse_change(file)
        manifest = {**_manifest(config, inputs, found, shards), "not_read": not_read, REVISIONS: revisions}
        manifest["files"] |= _gather(work, shards)
        publish(out, manifest, sorted({name.partition("/")[0] for name in manifest["files"]}))
        shutil.rmtree(work)
    return manifest


def _paths(shards: list[Shard]) -> list[str]:
    return list(dict.fromkeys(shard.path for shard in shards))


def _writing(config: DataBuildConfig, work: Path, stages: list[Stage]) -> Stage:
    removals = stages[-1]
    cleaning = Cleaning(config, work, partial(open_shard, config))
    return Stage(_WRITE, removals.tasks, partial(write_records, cleaning), removals.made_from)


def write_records(cleaning: Cleaning, part: Part) -> dict[str, Any]:
    """Write the records of a shard that stay, as JSON lines; a line is copied as it is."""
    import zstandard

    shard = part.shard
    removed = np.fromiter((removal.place for removal in read_removals(cleaning.work, shard)), np.int64)
    kept = np.delete(read_names(cleaning.path("ids", part.number))[1], removed)
    path = cleaning.work / RESULT / shard.corpus / f"{shard.number:05}.jsonl.zst"
    path.parent.mkdir(parents=True, exist_ok=True)
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    with replacing(path) as temporary, temporary.open("wb") as file, compressor.stream_writer(file) as stream:
        row = 0
        for number, line in _records(shard):
            if row < len(kept) and kept[row] == number:
                if isinstance(line, BadRecord):
                    raise DataError(
                        f"{shard.path}, row {number}: {line}",
                        "its text can be read, but records are written with all their columns",
                        "mend the row, or take the column out of the file",
                    )
                stream.write(line + b"\n")
                row += 1
        if row != len(kept):
            raise DataError(
                f"{shard.path}: {row} records are there of {len(kept)} that are to be written",
                "the file is not the one that was looked through",
                "start again when nothing writes it any more",
            )
    return {"documents": row, "sha256": hash_file(path), FILES: cleaning.files(path)}


def _records(shard: Shard) -> Iterator[tuple[int, bytes | BadRecord]]:
    assert shard.first is not None
    if not is_parquet(shard.path):
        for number, line in numbered_lines(shard.path, shard.part, shard.first):
            yield number, line.rstrip(b"\r\n")
        return
    import pyarrow.parquet

    with open_input(shard.path) as raw:
        columns = pyarrow.parquet.read_schema(raw).names
    for number, row in numbered_rows(shard.path, columns, (), shard.part, shard.first):
        yield number, row if isinstance(row, BadRecord) else orjson.dumps(row, default=str)


def _manifest(
    config: DataBuildConfig, inputs: dict[str, str], facts: dict[str, list[dict[str, Any]]], shards: dict[str, Any]
) -> dict[str, Any]:
    cleaning = clean_facts(config, facts, shards)
    assert cleaning is not None
    accounts, files = {name: Accounts() for name in shards}, {}
    for shard, seen, written in zip(compared(config, shards), facts[SIGNATURES], facts[_WRITE], strict=True):
        accounts[shard.corpus] += Accounts(**seen["accounts"])
        files[f"{shard.corpus}/{shard.number:05}.jsonl.zst"] = {
            "from": shard.name, "documents": written["documents"], "sha256": written["sha256"]
        }  # fmt: skip
    for name, own in accounts.items():
        for reason, count in cleaning["corpora"][name]["removed"].items():
            own.remove(reason, count)
    return {
        "settings": config.model_dump(mode="json"),
        "inputs": inputs,
        "accounts": {name: own.as_json() for name, own in accounts.items()},
        "cleaning": cleaning,
        "files": files,
    }


def _gather(work: Path, shards: dict[str, list[Shard]]) -> dict[str, Any]:
    """All removals in one file; returns its entry in the manifest."""
    path = work / RESULT / _REMOVALS
    with replacing(path) as temporary, temporary.open("wb") as file:
        for shard in (shard for own in shards.values() for shard in own):
            with removals_path(work, shard).open("rb") as part:
                shutil.copyfileobj(part, file)
    return {_REMOVALS: {"sha256": hash_file(path)}}


def _verify(out: Path, manifest: dict[str, Any]) -> None:
    for name, facts in manifest["files"].items():
        if not (out / name).is_file() or hash_file(out / name) != facts["sha256"]:
            raise DataError(
                f"{out / name} is missing or was altered", "its hash is not the manifest's", f"delete {out}, run again"
            )

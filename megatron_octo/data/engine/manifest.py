"""The manifest of a data directory: what it holds, what that follows from, and whether it is still so."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_octo import __version__
from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.corpora.registry import adapter_of
from megatron_octo.data.engine.code import code_of
from megatron_octo.data.engine.plan import FORMAT
from megatron_octo.data.engine.publish import MANIFEST
from megatron_octo.data.engine.stage import FILES
from megatron_octo.data.index.verify import check_hashes, verify_pair
from megatron_octo.errors import DataError
from megatron_octo.files import hash_directory, hash_file, read_json


def make_manifest(
    config: DataBuildConfig, inputs: dict[str, Any], tokenizer: dict[str, Any], sources: dict[str, dict[str, Any]],
    problems: dict[str, dict[str, Any]], cleaning: dict[str, Any] | None = None,
    not_read: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything a directory holds and follows from; no times and no machine: equal builds, equal manifests.

    Args:
        config: what was built.
        inputs: size and hash of every input file, by field and name.
        tokenizer: facts of its task.
        sources: facts of each joined source.
        problems: count and hash of each split.
        cleaning: what was left out and how well leaks are found; None where nothing is cleaned.
        not_read: files in the folders of corpora that no corpus reads, see `unread_files`.
    """
    return {
        "format": FORMAT,
        "code": __version__,
        "settings": config.model_dump(mode="json"),
        "inputs": inputs,
        "not_read": not_read or {},
        "tokenizer": {"directory": "tokenizer", **_published(tokenizer)},
        "sources": {name: {**_origin(config, name), **_published(facts)} for name, facts in sources.items()},
        "problems": problems,
        "cleaning": cleaning,
        "documents": sum(facts["documents"] for facts in sources.values()),
        "tokens": sum(facts["tokens"] for facts in sources.values()),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {**code_of(), "megatron-core": version("megatron-core")}


def _origin(config: DataBuildConfig, name: str) -> dict[str, Any]:
    """Where a corpus is from and under what licence, as far as its adapter knows."""
    if name not in config.corpora:
        return {"origin": "generated"}
    adapter = adapter_of(config, name)
    return {"origin": adapter.hub or adapter.title, "licence": adapter.licence or None}


def _published(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != FILES}


def verify_data(out: Path) -> dict[str, Any]:
    """Check every file of a finished build against its manifest.

    Args:
        out: data directory.

    Returns:
        The manifest.

    Raises:
        DataError: there is no manifest, or a file is missing, damaged or altered.
    """
    manifest = read_json(out / MANIFEST)
    if not isinstance(manifest, dict):
        raise DataError(f"{out / MANIFEST} does not exist or is damaged", "it is written last", "build the data")
    tokenizer = manifest["tokenizer"]
    for name, facts in manifest["sources"].items():
        verify_pair(out / name, tokenizer["rows"], tokenizer["end_of_text"], facts)
    check_hashes(out, {f"problems/{split}.jsonl": facts["sha256"] for split, facts in manifest["problems"].items()})
    if hash_directory(out / "tokenizer") != tokenizer["sha256"]:
        raise DataError(f"{out / 'tokenizer'} was altered after it was written", fix="build the data again")
    return manifest


def intact_sources(out: Path, manifest: dict[str, Any]) -> frozenset[str]:
    """Names of the sources whose files are all as the manifest says, and that go together with what is made now.

    That is none where the manifest is of other code: what this one makes may differ.
    """
    if (manifest.get("format"), manifest.get("versions")) != (FORMAT, _versions()):
        return frozenset()
    return frozenset(
        name
        for name, facts in manifest["sources"].items()
        if all((out / file).is_file() and hash_file(out / file) == known for file, known in facts["sha256"].items())
    )


def broken_parts(out: Path, manifest: dict[str, Any], intact: Collection[str]) -> list[str]:
    """What of a finished build is made again: sources, `tokenizer`, files of problems."""
    files = {f"problems/{split}.jsonl": facts["sha256"] for split, facts in manifest["problems"].items()}
    altered = [name for name, known in files.items() if not (out / name).is_file() or hash_file(out / name) != known]
    whole = (out / "tokenizer").is_dir() and hash_directory(out / "tokenizer") == manifest["tokenizer"]["sha256"]
    return [*(name for name in manifest["sources"] if name not in intact), *([] if whole else ["tokenizer"]), *altered]

"""Build a data directory: tokenizer, indexed sources, problems, and a manifest that vouches for all of it.

Every part is published whole and leaves a small record of what it was made from and what it hashes to. A build that
was killed starts again with the same command: parts whose record fits are kept, the rest is made.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron_octo.config.data import DataBuildConfig, expand_path
from megatron_octo.config.load import differences
from megatron_octo.data.encode import TOKENIZER_FILES, Encoder, tokenizer_digest
from megatron_octo.data.indexed import IndexedWriter, bin_path, idx_path, read_index
from megatron_octo.data.jsonl import input_path
from megatron_octo.data.sources import (
    Problem,
    Texts,
    build_world,
    heldout_questions,
    problems,
    texts,
    without_heldout,
)
from megatron_octo.errors import ConfigError, DataError, StageFailed
from megatron_octo.files import hash_directory, hash_file, hash_json, hold, read_json, write_json, write_text
from megatron_octo.progress import Progress

_FORMAT = 1
_RECORDS = "records"
_STEP = 1024  # documents between two steps of the progress bar
_VERSIONS = ("megatron-core", "tokenizers", "numpy")

Advance = Callable[[int], None]


@dataclass(frozen=True)
class _Job:
    """One source to build; travels to worker processes."""

    name: str
    config: DataBuildConfig
    out: Path
    heldout: frozenset[str]
    made_from: dict[str, Any]


def build_data(config: DataBuildConfig, out: Path, workers: int = 1) -> dict[str, Any]:
    """Build a data directory, or finish one that was interrupted.

    Args:
        config: what to build.
        out: directory to write: `tokenizer/`, `<source>.bin`, `<source>.idx`, `problems/`, `manifest.json` (last).
        workers: sources built at the same time, each in a process of its own; the result does not depend on it.

    Returns:
        The manifest.

    Raises:
        ConfigError: the directory holds another build (differing fields are named), or a setting is not allowed.
        DataError: an input is missing or broken, or ends before its token budget.
        StageFailed: a worker process was killed.
    """
    if workers < 1:
        raise ConfigError(f"workers = {workers}", "somebody has to do the work", "use 1 or more")
    build_world(config)
    inputs = _inputs(config)
    with only_writer(out):
        _refuse_another_build(out, {"settings": config.model_dump(mode="json"), "inputs": inputs})
        sets = _build_problems(config, out)
        tokenizer = _build_tokenizer(config, out, _made_from(config, inputs, config.sources))
        jobs = [_job(config, out, name, inputs, tokenizer["sha256"], sets["heldout"]) for name in config.sources]
        sources = _build_sources(jobs, workers)
        manifest = _manifest(config, out, inputs, tokenizer, sources, sets)
        if read_json(out / "manifest.json") != manifest:
            write_json(out / "manifest.json", manifest)
    return manifest


def only_writer(out: Path) -> IO[str]:
    """Keep other processes from building into the same directory while the returned context is open.

    Raises:
        DataError: another process is at it.
    """
    try:
        return hold(out)
    except BlockingIOError as error:
        raise DataError(
            f"{out} is being written by another process (process {error.strerror})",
            "two writers would mix their files",
            "wait for it to end",
        ) from None


def verify_data(out: Path) -> dict[str, Any]:
    """Check every file of a finished build against its manifest.

    Args:
        out: data directory.

    Returns:
        The manifest.

    Raises:
        DataError: there is no manifest, or a file is missing, damaged or altered.
    """
    manifest = read_json(out / "manifest.json")
    if not isinstance(manifest, dict):
        raise DataError(f"{out / 'manifest.json'} does not exist or is damaged", "it is written last", "build the data")
    for name, facts in manifest["sources"].items():
        read_index(out / name)
        _check_hashes(out, facts["sha256"])
    _check_hashes(out, {f"problems/{split}.jsonl": facts["sha256"] for split, facts in manifest["problems"].items()})
    if hash_directory(out / "tokenizer") != manifest["tokenizer"]["sha256"]:
        raise DataError(f"{out / 'tokenizer'} was altered after it was written", fix="build the data again")
    return manifest


def _check_hashes(out: Path, hashes: dict[str, str]) -> None:
    for name, expected in hashes.items():
        path = out / name
        if not path.is_file():
            raise DataError(f"{path} does not exist", "the manifest lists it", "build the data again")
        if hash_file(path) != expected:
            raise DataError(
                f"{path} was altered after it was written", "its hash is not the manifest's", "build the data again"
            )


def _inputs(config: DataBuildConfig) -> dict[str, dict[str, Any]]:
    """Every input file with its hash; the first thing a build does, since a missing file should be told at once."""
    found = {}
    for where, file in config.input_files.items():
        path = input_path(file, where)
        found[where] = {"path": file.path, "bytes": path.stat().st_size, "sha256": hash_file(path)}
    if config.tokenizer.path is not None:
        directory = _given_tokenizer(config.tokenizer.path)
        files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
        found["tokenizer.path"] = {
            "path": config.tokenizer.path,
            "bytes": sum(path.stat().st_size for path in files),
            "sha256": tokenizer_digest(directory),
        }
    return found


def _given_tokenizer(text: str) -> Path:
    directory = expand_path(text, "tokenizer.path")
    Encoder(directory)
    return directory


def _refuse_another_build(out: Path, plan: dict[str, Any]) -> None:
    """Claim the directory for a plan, or check that it is claimed for the same one.

    While a build is unfinished its inputs may still be mended: parts made from what changed are made again.
    """
    path, finished = out / "build.json", (out / "manifest.json").exists()
    claimed = read_json(path)
    found = differences(claimed, plan) if claimed else []
    if found and (finished or claimed["settings"] != plan["settings"]):
        raise ConfigError(
            f"{out} holds another build: {'; '.join(found[:6])}{' ...' if len(found) > 6 else ''}",
            "one directory is one build, from settings and inputs that do not change",
            "use another --out, or delete the directory",
        )
    if claimed != plan:
        write_json(path, plan)


def _made_from(config: DataBuildConfig, inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What parts follow from: the settings, and the inputs of the named sources and of what is held out of them."""
    used = [*(f"corpora.{name}" for name in names), "problems.heldout.file", "tokenizer.path"]
    return {
        "format": _FORMAT,
        "settings": hash_json(config.model_dump(mode="json")),
        "inputs": {where: inputs[where]["sha256"] for where in used if where in inputs},
    }


def _build_problems(config: DataBuildConfig, out: Path) -> dict[str, list[Problem]]:
    heldout = problems(config, "heldout")
    sets = {"train": without_heldout(problems(config, "train"), heldout), "heldout": heldout}
    for split, found in sets.items():
        lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in found]
        write_text(out / "problems" / f"{split}.jsonl", "".join(lines))
    return sets


def _build_tokenizer(config: DataBuildConfig, out: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """Train or copy the tokenizer into `out/tokenizer`, unless it is there unaltered."""
    directory, record = out / "tokenizer", read_json(_record_path(out, "tokenizer"))
    kept = record is not None and record["made_from"] == made_from and directory.is_dir()
    if not kept or hash_directory(directory) != record["facts"]["sha256"]:
        _publish_tokenizer(config, directory)
        record = {"made_from": made_from, "facts": {"sha256": hash_directory(directory)}}
        write_json(_record_path(out, "tokenizer"), record)
    encoder = Encoder(directory)
    return {"directory": "tokenizer", **record["facts"], "vocabulary": encoder.vocabulary, "end_of_text": encoder.end}


def _publish_tokenizer(config: DataBuildConfig, directory: Path) -> None:
    temporary = directory.with_name(".tokenizer.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed
    temporary.mkdir()
    try:
        if config.tokenizer.path is not None:
            _copy_tokenizer(_given_tokenizer(config.tokenizer.path), temporary)
        else:
            _train_tokenizer(config, temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _train_tokenizer(config: DataBuildConfig, out: Path) -> None:
    from megatron_octo.data.tokenizer import train_tokenizer

    train = config.tokenizer.train
    assert train is not None
    heldout = heldout_questions(problems(config, "heldout"))

    def beginnings() -> Iterator[str]:
        for name in train.corpora or config.sources:
            yield from islice(texts(config, name, heldout).documents, train.documents)

    train_tokenizer(beginnings(), train.vocabulary_size, out)


def _job(
    config: DataBuildConfig, out: Path, name: str, inputs: dict[str, Any], tokenizer: str, heldout: list[Problem]
) -> _Job:
    made_from = {**_made_from(config, inputs, [name]), "tokenizer": tokenizer}
    return _Job(name, config, out, heldout_questions(heldout), made_from)


def _build_sources(jobs: list[_Job], workers: int) -> dict[str, dict[str, Any]]:
    """Build or keep every source; returns their facts in the order of the jobs."""
    budgets = [job.config.budgets[job.name] for job in jobs]
    total = None if None in budgets else sum(budget or 0 for budget in budgets)
    with Progress("tokenise", total, "tokens") as bar:
        if workers == 1 or len(jobs) == 1:
            return {job.name: _build_source(job, bar.advance) for job in jobs}
        facts: dict[str, dict[str, Any]] = {}
        with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(_build_source, job): job.name for job in jobs}
            for future in as_completed(futures):
                facts[futures[future]] = _result_of(future.result, futures[future])
                bar.advance(facts[futures[future]]["tokens"])
        return {job.name: facts[job.name] for job in jobs}


def _result_of(result: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        return result()
    except BrokenProcessPool:
        raise StageFailed(
            f"a data worker was killed while '{name}' was built", "killed from outside, or out of memory",
            "start the same command again, with fewer workers if memory is short",
        ) from None  # fmt: skip


def _build_source(job: _Job, advance: Advance = lambda tokens: None) -> dict[str, Any]:
    """Write one indexed source and its record, unless both are there and the files hash to what the record says."""
    record = read_json(_record_path(job.out, job.name))
    if record and record["made_from"] == job.made_from and _files_hash_to(job.out, record["facts"]["sha256"]):
        advance(record["facts"]["tokens"])
        return record["facts"]
    found = texts(job.config, job.name, job.heldout)
    encoder = Encoder(job.out / "tokenizer")
    with IndexedWriter(job.out / job.name, encoder.vocabulary) as writer:
        _fill(writer, encoder, found, job.config.budgets[job.name], advance)
        _check_amount(job, writer, found)
        writer.publish()
    facts = _facts(writer, found)
    write_json(_record_path(job.out, job.name), {"made_from": job.made_from, "facts": facts})
    return facts


def _fill(writer: IndexedWriter, encoder: Encoder, found: Texts, budget: int | None, advance: Advance) -> None:
    """Add documents until the budget is reached; the document that reaches it is kept whole."""
    told = 0
    for tokens in encoder.documents(found.documents):
        writer.add(tokens)
        if writer.documents % _STEP == 0:
            advance(writer.tokens - told)
            told = writer.tokens
        if budget is not None and writer.tokens >= budget:
            break
    advance(writer.tokens - told)


def _check_amount(job: _Job, writer: IndexedWriter, found: Texts) -> None:
    budget, where = job.config.budgets[job.name], f"corpora.{job.name}"
    if not writer.documents:
        left_out = f"; {found.bad.count} bad lines and {found.heldout} held-out records left out" if found.bad else ""
        raise DataError(f"{where}: {found.bad and found.bad.path} holds no documents{left_out}", fix="check the file")
    if budget is not None and writer.tokens < budget:
        raise DataError(
            f"{where}.tokens = {budget}, but {found.bad and found.bad.path} has only {writer.tokens}",
            "a token budget is a promise to the mixture",
            f"set {where}.tokens to all or to at most {writer.tokens}",
        )


def _facts(writer: IndexedWriter, found: Texts) -> dict[str, Any]:
    index = read_index(writer.prefix)
    files = (bin_path(writer.prefix), idx_path(writer.prefix))
    facts: dict[str, Any] = {
        "documents": writer.documents,
        "tokens": writer.tokens,
        "largest_token": writer.largest_token,
        "unigram_entropy": writer.unigram_entropy,
        "dtype": index.dtype.name,
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": {path.name: hash_file(path) for path in files},
    }
    if found.bad is not None:
        facts |= {"bad_lines": found.bad.count, "first_bad_lines": found.bad.first, "heldout_left_out": found.heldout}
    return facts


def _files_hash_to(out: Path, hashes: dict[str, str]) -> bool:
    return all((out / name).is_file() and hash_file(out / name) == expected for name, expected in hashes.items())


def _record_path(out: Path, name: str) -> Path:
    return out / _RECORDS / f"{name}.json"


def _manifest(
    config: DataBuildConfig, out: Path, inputs: dict[str, Any], tokenizer: dict[str, Any],
    sources: dict[str, dict[str, Any]], sets: dict[str, list[Problem]],
) -> dict[str, Any]:  # fmt: skip
    """Everything the directory holds and follows from; no times and no machine: equal builds, equal manifests."""
    hashes = {split: hash_file(out / "problems" / f"{split}.jsonl") for split in sets}
    return {
        "format": _FORMAT,
        "settings": config.model_dump(mode="json"),
        "inputs": inputs,
        "tokenizer": tokenizer,
        "sources": sources,
        "problems": {split: {"count": len(found), "sha256": hashes[split]} for split, found in sets.items()},
        "documents": sum(facts["documents"] for facts in sources.values()),
        "tokens": sum(facts["tokens"] for facts in sources.values()),
        "versions": {name: version(name) for name in _VERSIONS},
    }

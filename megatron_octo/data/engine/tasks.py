"""What the tasks of a build do, each in whatever process gets it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_octo.config.data import DataBuildConfig, expand_path
from megatron_octo.data.engine.inputs import InputFile, refuse_change
from megatron_octo.data.engine.publish import RESULT, WORK
from megatron_octo.data.engine.shards import Shard
from megatron_octo.data.engine.stage import FILES, RECORDS, advance
from megatron_octo.data.index.encode import Encoder
from megatron_octo.data.index.pairs import IndexedWriter, bin_path, idx_path, read_index
from megatron_octo.data.sources import heldout_questions, problems, texts
from megatron_octo.errors import DataError
from megatron_octo.files import hash_directory, hash_file, read_json

TOKENISE = "tokenise"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                    "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")  # fmt: skip


@dataclass(frozen=True)
class Build:
    """What every task of a build knows.

    Args:
        config: what is built.
        out: data directory, absolute.
    """

    config: DataBuildConfig
    out: Path

    @property
    def work(self) -> Path:
        """Directory of records and of pieces."""
        return self.out / WORK

    @property
    def result(self) -> Path:
        """Directory where the result grows."""
        return self.work / RESULT


@dataclass(frozen=True)
class Piece:
    """One shard to tokenise.

    Args:
        shard: what to read.
        file: the shard's file as the build found it; None for generated text.
        sha256: what the file hashes to.
        first: number of the task of the corpus's first shard, to find what its earlier shards gave.
        after: hash over the whole corpus where the token budget may make this shard needless; else None.
    """

    shard: Shard
    file: InputFile | None = field(compare=False)
    sha256: str | None
    first: int
    after: str | None


@dataclass(frozen=True)
class Corpus:
    """One corpus to join.

    Args:
        name: of the source.
        pieces: numbers of its tokenise tasks, first and one beyond the last.
        made_from: hash over what all its pieces follow from.
    """

    name: str
    pieces: tuple[int, int]
    made_from: str


def make_tokenizer(build: Build, corpora: list[str]) -> dict[str, Any]:
    """Train the tokenizer on the beginnings of corpora, or copy the given one, into the result.

    Returns:
        Its hash, vocabulary, end-of-text token and files.
    """
    config, directory = build.config, build.result / "tokenizer"
    temporary = directory.with_name(".tokenizer.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed
    temporary.mkdir(parents=True)
    try:
        if config.tokenizer.path is not None:
            _copy_tokenizer(expand_path(config.tokenizer.path, "tokenizer.path"), temporary)
        else:
            _train_tokenizer(config, corpora, temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    encoder = Encoder(directory)
    facts = {"sha256": hash_directory(directory), "vocabulary": encoder.vocabulary, "end_of_text": encoder.end}
    return {**facts, FILES: _sizes(build, sorted(directory.iterdir()))}


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _train_tokenizer(config: DataBuildConfig, corpora: list[str], out: Path) -> None:
    from megatron_octo.data.index.train_tokenizer import train_tokenizer

    train = config.tokenizer.train
    assert train is not None
    heldout = heldout_questions(problems(config, "heldout"))

    def beginnings() -> Iterator[str]:
        for name in corpora:
            yield from islice(texts(config, name, heldout).documents, train.documents)

    train_tokenizer(beginnings(), train.vocabulary_size, out)


def tokenise(build: Build, piece: Piece) -> dict[str, Any]:
    """Write the pair of one shard, unless earlier shards reach the token budget of its corpus without it."""
    budget = build.config.budgets[piece.shard.corpus]
    if budget is not None and _tokens_before(build, piece, budget) >= budget:
        return {"needed": False}
    config, shard = build.config, piece.shard
    prefix = build.work / "pieces" / shard.corpus / f"{shard.number:05}"
    prefix.parent.mkdir(parents=True, exist_ok=True)
    found = texts(config, shard.corpus, heldout_questions(problems(config, "heldout")))
    encoder = Encoder(build.result / "tokenizer")
    with IndexedWriter(prefix, encoder.vocabulary) as writer:
        for tokens in encoder.documents(found.documents):
            writer.add(tokens)
            advance(len(tokens))
            if budget is not None and writer.tokens >= budget:
                break
        writer.publish()
    if piece.file is not None:
        refuse_change(piece.file)
    facts: dict[str, Any] = {"documents": writer.documents, "tokens": writer.tokens}
    if writer.documents:
        facts |= {"largest_token": writer.largest_token, "unigram_entropy": writer.unigram_entropy}
    if found.bad is not None:
        facts |= {"bad_lines": found.bad.count, "first_bad_lines": found.bad.first, "heldout_left_out": found.heldout}
    return {**facts, FILES: _sizes(build, [bin_path(prefix), idx_path(prefix)])}


def _tokens_before(build: Build, piece: Piece, budget: int) -> int:
    """Tokens of the corpus's shards before this one, as far as they are known without a gap."""
    tokens = 0
    for number in range(piece.first, piece.first + piece.shard.number):
        record = read_json(build.work / RECORDS / TOKENISE / f"{number:05}.json")
        if record is None or tokens >= budget:
            break
        tokens += record["facts"].get("tokens", 0)
    return tokens


def join(build: Build, corpus: Corpus) -> dict[str, Any]:
    """Make one pair of the pieces of a corpus.

    Raises:
        DataError: the corpus has no documents, or fewer tokens than its budget.
    """
    numbers = range(*corpus.pieces)
    facts = [read_json(build.work / RECORDS / TOKENISE / f"{number:05}.json")["facts"] for number in numbers]
    prefix, piece = build.result / corpus.name, build.work / "pieces" / corpus.name / "00000"
    where, budget = f"corpora.{corpus.name}", build.config.budgets[corpus.name]
    path = build.config.corpora[corpus.name].path if corpus.name in build.config.corpora else "the world"
    if not facts[0]["documents"]:
        raise DataError(f"{where}: {path} holds no documents", fix="check the file")
    if budget is not None and facts[0]["tokens"] < budget:
        raise DataError(
            f"{where}.tokens = {budget}, but {path} has only {facts[0]['tokens']}",
            "a token budget is a promise to the mixture",
            f"set {where}.tokens to all or to at most {facts[0]['tokens']}",
        )
    for path in (bin_path, idx_path):
        temporary = path(prefix).with_suffix(".partial")
        shutil.copyfile(path(piece), temporary)
        temporary.rename(path(prefix))
    files = (bin_path(prefix), idx_path(prefix))
    found = {name: value for name, value in facts[0].items() if name != FILES}
    found |= {"dtype": read_index(prefix).dtype.name, "bytes": sum(path.stat().st_size for path in files)}
    return {**found, "sha256": {path.name: hash_file(path) for path in files}, FILES: _sizes(build, files)}


def drop_pieces(build: Build, corpus: Corpus) -> None:
    """Delete the pieces of a corpus that is joined."""
    shutil.rmtree(build.work / "pieces" / corpus.name, ignore_errors=True)


def _sizes(build: Build, paths: Any) -> dict[str, int]:
    return {str(path.relative_to(build.work)): path.stat().st_size for path in paths}

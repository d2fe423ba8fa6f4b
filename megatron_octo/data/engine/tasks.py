"""What the tasks of a build do, each in whatever process gets it."""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.clean.removals import LEAK, Removal, read_removals
from megatron_octo.data.clean.stages import REMOVALS
from megatron_octo.data.corpora.read import HELDOUT, Accounts, ShardReader
from megatron_octo.data.corpora.shard import Shard
from megatron_octo.data.engine.inputs import InputFile, Version, refuse_change
from megatron_octo.data.engine.publish import RESULT, WORK
from megatron_octo.data.engine.stage import FILES, facts_of, left, record_path
from megatron_octo.data.index.digest import SENTENCE_PIECE, TOKENIZER_FILES, token_rules
from megatron_octo.data.index.encode import load_encoder
from megatron_octo.data.index.join import join_pieces
from megatron_octo.data.index.table import DocumentTable, docs_path, pair_files
from megatron_octo.data.index.tokenise import without, write_piece
from megatron_octo.errors import DataError
from megatron_octo.files import hash_directory, read_json

TOKENISE = "tokenise"

_SUMS: dict[tuple[Path, str | None, int], list[int]] = {}  # of a corpus: tokens of its first 0, 1, ... shards


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
        version: of the file.
        first: number of the task of the corpus's first shard, to find what its earlier shards gave.
        after: hash over all that the corpus's pieces follow from where the token budget may make this shard needless;
            else None. Pieces believe each other's records only where it is the same.
        removals: number and key of the task that says what to leave out; None where nothing is cleaned.
    """

    shard: Shard
    file: InputFile | None = field(compare=False)
    version: Version | None
    first: int
    after: str | None
    removals: tuple[int, str] | None


@dataclass(frozen=True)
class Corpus:
    """One corpus to join.

    Args:
        name: of the source.
        pieces: numbers of its tokenise tasks, first and one beyond the last.
        made_from: hash over what all its pieces follow from.
        removals: of each piece, as in `Piece`.
    """

    name: str
    pieces: tuple[int, int]
    made_from: str
    removals: tuple[tuple[int, str] | None, ...] = field(compare=False)


@dataclass(frozen=True)
class Tokenizer:
    """What the tokenizer is made of.

    Args:
        files: of the given one.
        shards: of each corpus that one is trained on.
    """

    files: tuple[str, ...]
    shards: tuple[tuple[Shard, ...], ...]


def make_tokenizer(build: Build, task: Tokenizer) -> dict[str, Any]:
    """Train the tokenizer on the beginnings of corpora, or copy the given one, into the result.

    Returns:
        Its hash, vocabulary, end-of-text token and files.
    """
    config, directory = build.config, build.result / "tokenizer"
    temporary = directory.with_name(f".tokenizer.{uuid.uuid4().hex[:12]}.partial")
    temporary.mkdir(parents=True)
    try:
        if task.files:
            _copy_tokenizer([Path(file) for file in task.files], temporary)
        else:
            _train_tokenizer(config, task.shards, temporary)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    encoder = load_encoder(directory, config.index)
    facts = {
        "sha256": hash_directory(directory),
        "rules": token_rules(directory),
        "vocabulary": encoder.vocabulary,
        "rows": encoder.rows,
        "begin_of_text": encoder.begin,
        "end_of_text": encoder.end,
        "left_out_of_its_own": encoder.added_by_itself,
    }
    return {**facts, FILES: left(build.work, sorted(directory.iterdir()))}


def _copy_tokenizer(files: list[Path], out: Path) -> None:
    for file in files:  # one that stands alone is a SentencePiece model under any name
        shutil.copyfile(file, out / (file.name if file.name in TOKENIZER_FILES else SENTENCE_PIECE))


def _train_tokenizer(config: DataBuildConfig, corpora: tuple[tuple[Shard, ...], ...], out: Path) -> None:
    from megatron_octo.data.index.train_tokenizer import train_tokenizer

    train = config.tokenizer.train
    assert train is not None

    def beginnings() -> Iterator[str]:
        for shards in corpora:
            documents = chain.from_iterable(ShardReader(config, shard) for shard in shards)
            yield from (document.text for document in islice(documents, train.documents))

    train_tokenizer(beginnings(), train.vocabulary_size, out)


def tokenise(build: Build, piece: Piece) -> dict[str, Any]:
    """Write the pair of one shard, unless earlier shards reach the token budget of its corpus without it."""
    budget = build.config.budgets[piece.shard.corpus]
    if budget is not None and _tokens_before(build, piece, budget) >= budget:
        return {"needed": False, "after": piece.after}
    config, shard = build.config, piece.shard
    prefix = _piece_prefix(build, shard.corpus, shard.number)
    reader, skipped, removed = ShardReader(config, shard), {}, {}
    documents = without(reader, _removals(build, piece), removed)
    facts = write_piece(documents, prefix, load_encoder(build.result / "tokenizer", config.index), skipped, budget)
    if piece.file is not None:
        refuse_change(piece.file)
    for reason, count in skipped.items():
        reader.accounts.skip(reason, count)
    for reason, count in removed.items():
        reader.accounts.remove(reason, count)
    _check_account(prefix, reader.accounts, facts["documents"])
    facts |= {"after": piece.after, "accounts": reader.accounts.as_json()}
    return {**facts, FILES: left(build.work, pair_files(prefix))}


def _removals(build: Build, piece: Piece) -> Iterable[Removal]:
    """What to leave out of a shard, which the task that finds it must have said."""
    if piece.removals is None:
        return ()
    if facts_of(build.work, REMOVALS, *piece.removals) is None:
        raise DataError(
            f"{piece.shard.path}: nothing says yet what to leave out of it",
            f"the stage {REMOVALS} does, and goes before {TOKENISE}",
            "run the stages in order, each when the one before it is finished",
        )
    return read_removals(build.work, piece.shard)


def _check_account(prefix: Path, accounts: Accounts, documents: int) -> None:
    """Stop at a defect of our own: no record is ever lost without a word."""
    out = sum(accounts.skipped.values()) + sum(accounts.removed.values())
    if accounts.documents != documents or accounts.read != documents + out:
        raise AssertionError(f"{prefix}: {accounts} do not add up to {documents} documents")


def _piece_prefix(build: Build, corpus: str, number: int) -> Path:
    return build.work / "pieces" / corpus / f"{number:05}"


def _tokens_before(build: Build, piece: Piece, budget: int) -> int:
    """Tokens of the corpus's shards before this one, as far as they are known without a gap."""
    wanted = piece.shard.number
    sums = _SUMS.setdefault((build.work, piece.after, piece.first), [0])  # what a record once said stays true
    while len(sums) <= wanted and sums[-1] < budget:
        record = read_json(record_path(build.work, TOKENISE, piece.first + len(sums) - 1))
        if record is None or record["facts"].get("after") != piece.after:
            break
        sums.append(sums[-1] + record["facts"].get("tokens", 0))
    return sums[min(wanted, len(sums) - 1)]


def join(build: Build, corpus: Corpus) -> dict[str, Any]:
    """Make one pair of the pieces of a corpus.

    Raises:
        DataError: the corpus has no documents, fewer tokens than its budget, or a piece with what is to be left out.
    """
    budget, needed, tokens = build.config.budgets[corpus.name], [], 0
    for number in range(*corpus.pieces):
        if budget is None or tokens < budget:  # another worker may have made more than these
            needed.append(read_json(record_path(build.work, TOKENISE, number))["facts"])
            tokens += needed[-1]["tokens"]
    for found, removals in zip(needed, corpus.removals, strict=False):
        _check_removed(build, corpus.name, found, removals)
    accounts = sum((Accounts(**found["accounts"]) for found in needed), Accounts())
    if accounts.read and not accounts.documents:
        left_out = {**accounts.skipped, **accounts.removed}
        raise DataError(
            f"corpora.{corpus.name} holds no documents",
            f"all its {accounts.read} records are left out: " + ", ".join(f"{left_out[why]} {why}" for why in left_out),
            "check its files, its adapter and its fields",
        )
    prefix = build.result / corpus.name
    pieces = [_piece_prefix(build, corpus.name, number) for number in range(len(needed))]
    joined = join_pieces(pieces, prefix, budget, [found["blake3"] for found in needed])
    _check_account(prefix, accounts, joined["documents"] + joined["beyond_budget"]["documents"])
    return {**joined, "accounts": accounts.as_json(), FILES: left(build.work, pair_files(prefix))}


def _check_removed(build: Build, name: str, found: dict[str, Any], removals: tuple[int, str] | None) -> None:
    """Check that a piece left out what it was to leave out: it is published, and the removals are believed."""
    wanted = (facts_of(build.work, REMOVALS, *removals) or {}).get("removed") if removals else {}
    removed = {reason: count for reason, count in found["accounts"]["removed"].items() if reason != HELDOUT}
    budget = build.config.budgets[name]
    cut = budget is not None and found["tokens"] >= budget  # such a piece was not read to its end
    if wanted is None or not (removed == wanted or (cut and Counter(removed) <= Counter(wanted))):
        raise DataError(
            f"corpora.{name}: a piece left out {removed or 'nothing'}, and {wanted or 'nothing'} was to be left out",
            "no document is published that is a duplicate or a leak",
            f"delete {build.work} and start again",
        )


@dataclass(frozen=True)
class Cut:
    """A shard whose removals are looked through for documents that a token budget left out elsewhere.

    Args:
        shard: the shard.
        removals: key of the task that wrote its removals.
    """

    shard: Shard
    removals: str


def beyond_budgets(build: Build, cut: Cut) -> dict[str, Any]:
    """Count the documents left out of a shard as duplicates whose kept copy lies beyond the budget of its corpus.

    Neither is in the result then. Duplicates within one corpus do not count: what is kept comes first.
    """
    budgets, tables, lost = build.config.budgets, {}, 0
    for removal in read_removals(build.work, cut.shard):
        corpus = removal.other.partition("/")[0]
        if removal.reason == LEAK or corpus == cut.shard.corpus or budgets.get(corpus) is None:
            continue
        if corpus not in tables:
            joined = docs_path(build.result / corpus)
            tables[corpus] = DocumentTable(joined if joined.exists() else docs_path(build.out / corpus))
        lost += tables[corpus].find(removal.other) is None
    return {"corpus": cut.shard.corpus, "lost": lost}


@dataclass(frozen=True)
class Watched:
    """A task of another room, and the file it reads as the build found it."""

    task: Any
    file: InputFile | None = field(compare=False)


def watch(work: Callable[[Any], dict[str, Any]], watched: Watched) -> dict[str, Any]:
    """Do a task of another room; its result counts only if its file did not change meanwhile."""
    facts = work(watched.task)
    if watched.file is not None:
        refuse_change(watched.file)
    return facts


def drop_pieces(build: Build, corpus: Corpus) -> None:
    """Delete the pieces of a corpus that is joined."""
    shutil.rmtree(build.work / "pieces" / corpus.name, ignore_errors=True)

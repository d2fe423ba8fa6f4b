"""What one task reads: a file of a corpus, or a part of a large one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_octo.config.data import Corpus, Inputs
from megatron_octo.data.corpora.files import corpus_files
from megatron_octo.data.corpora.registry import adapter_of
from megatron_octo.data.corpora.render import gsm8k, prompted
from megatron_octo.errors import DataError

PART = 256 << 20
"""Bytes above which a local file is cut into parts of about this size, if its form allows it."""


@dataclass(frozen=True)
class Shard:
    """What one task reads; the same for any number of workers.

    Args:
        corpus: name in the build.
        number: place among the corpus's shards, in the order of its files.
        path: expanded path or URL; empty for generated text.
        part: bytes of a plain file of lines, of which those count that begin there; or row groups of a parquet file;
            None: the whole file.
        first: lines or rows of the file before it; None of lines that nobody has counted yet, see `numbered`.
        name: of the file within its corpus, the same on every machine.
    """

    corpus: str
    number: int
    path: str
    part: tuple[int, int] | None = None
    first: int | None = 0
    name: str = ""


def is_parquet(path: str) -> bool:
    """Whether a file has rows and not lines."""
    return path.endswith(".parquet")


def list_shards(config: Inputs, corpus: str, revisions: dict[str, str] | None = None) -> list[Shard]:
    """The shards of a source: its files in sorted order, large ones in parts.

    A plain file of lines is cut by its size alone, without a look into it; a parquet file between row groups. Files
    that are compressed as a whole, or behind a URL, stay whole.

    Args:
        config: the build.
        corpus: name of a corpus, or a kind of generated text: that is one endless shard.
        revisions: commits of what is read from the Hugging Face hub, see `corpus_files`.

    Raises:
        DataError: there are no files, one of them is no corpus file, or it cannot be read.
        ConfigError: the corpus's adapter or its fields are not what they can be.
    """
    if corpus in config.world.tokens:
        return [Shard(corpus, 0, "")]
    shards: list[Shard] = []
    for name, path in corpus_files(config, corpus, adapter_of(config, corpus), {} if revisions is None else revisions):
        for part, first in parts_of(path):
            shards.append(Shard(corpus, len(shards), path, part, first, name))
    return shards


def line_cuts(path: str, size: int) -> list[int]:
    """Where a file is cut whose parts are told by bytes: the first byte of each part; none where it stays whole."""
    plain = "://" not in path and path.endswith((".jsonl", ".ndjson", ".json"))
    return list(range(0, size, PART)) if plain and size > PART else []


def numbered(shards: Iterable[Shard], lines: Mapping[str, Sequence[int]]) -> list[Shard]:
    """Tell parts of files how many lines come before them.

    Args:
        shards: of any corpora.
        lines: of a file, by its path, the lines that begin before each of its `line_cuts`; a file that is not there
            has its parts left as they are.
    """

    def known(shard: Shard) -> Shard:
        if shard.first is not None or shard.part is None or shard.path not in lines:
            return shard
        return replace(shard, first=lines[shard.path][shard.part[0] // PART])

    return [known(shard) for shard in shards]


def refuse_shared_files(config: Inputs, shards: dict[str, list[Shard]]) -> None:
    """Check that no file is read in the same way by two corpora of a build; as question and as prose it may be.

    Raises:
        DataError: one is, under whatever name.
    """
    known: dict[tuple[str, str, str], str] = {}
    for name, own in shards.items():
        if name in config.world.tokens:
            continue
        way, form = reading_of(config.corpora[name]), _form(config, name)
        for path in dict.fromkeys(shard.path for shard in own):
            other = known.setdefault((real_path(path), way, form), name)
            if other != name:
                rule = "its documents would count twice"
                raise DataError(f"corpora.{name} and corpora.{other} both read {path}", rule, "leave it to one of them")


def reading_of(corpus: Corpus) -> str:
    """What a corpus takes of its records; two that agree here have the same items, if in two renderings."""
    return f"{corpus.adapter} {sorted(corpus.fields.items())}"


def real_path(path: str) -> str:
    """One name for a file: links followed; a URL as it is."""
    return path if "://" in path else os.path.realpath(path)


def _form(config: Inputs, name: str) -> str:
    """The rendering of a corpus; what some adapters publish is questions as they stand in prompts already."""
    rendering = config.corpora[name].rendering
    prompts = adapter_of(config, name).render in (prompted, gsm8k)
    return "qa" if prompts and rendering == "published" else rendering


def parts_of(path: str) -> Sequence[tuple[tuple[int, int] | None, int | None]]:
    """Parts of a file as it is now, each with the records before it as far as they are known.

    Raises:
        DataError: it cannot be read.
    """
    if "://" in path:
        return [(None, 0)]
    try:
        found = os.stat(path)
        if is_parquet(path) and found.st_size > PART:
            return _cut_rows(path, found.st_size, found.st_mtime_ns, PART)
        cuts = line_cuts(path, found.st_size)
        ends = [*cuts[1:], found.st_size]
        return [((start, end), None if start else 0) for start, end in zip(cuts, ends, strict=False)] or [(None, 0)]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})", fix="make it readable, or fetch it again") from None


@lru_cache
def _cut_rows(path: str, size: int, modified: int, part: int) -> tuple[tuple[tuple[int, int], int], ...]:
    import pyarrow

    from megatron_octo.data.corpora.rows import open_parquet

    found, start, rows, held = [], 0, 0, 0
    try:
        with open_parquet(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no parquet file ({error})", fix="fetch it again") from None
    share = size / max(1, sum(group.total_byte_size for group in groups))  # of what a group takes in the file
    before = 0
    for number, group in enumerate(groups):
        held, rows = held + group.total_byte_size * share, rows + group.num_rows
        if held >= part or number == len(groups) - 1:
            found.append(((start, number + 1), before))
            start, before, held = number + 1, rows, 0
    return tuple(found) or (((0, 0), 0),)

"""`octo data who`: which steps of a run, its ancestors and its branches read a document. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.checkpoint.family import Member, families
from megatron_octo.config.blends import Blend, blends_of
from megatron_octo.config.load import parse_config, read_yaml
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.pairs import Index, read_index
from megatron_octo.data.mix.epochs import Epochs, cached_epochs, shuffled
from megatron_octo.data.mix.identity import content_digest
from megatron_octo.data.mix.ledger import find_document, id_of, places_of_document
from megatron_octo.data.mix.mixture import windows_per_epoch
from megatron_octo.data.mix.order import order
from megatron_octo.errors import CheckpointError, DataError, OctoError
from megatron_octo.files import read_json
from megatron_octo.schedule.fork import LINEAGE
from megatron_octo.train.start import CACHE, CONFIG, REWINDS


@dataclass
class _Reader:
    """One run of the family, with what its order follows from."""

    member: Member
    run: RunConfig
    first: int
    blends: list[Blend]
    source: str | None = None
    taken: int = 0
    passes: int = 0
    note: str = ""
    readings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.first + self.run.steps * self.run.batch.global_batch


def who(
    run_dir: Path, document: str | None = None, number: int | None = None, source: str | None = None
) -> dict[str, Any]:
    """Answer which steps read a document.

    Args:
        run_dir: a run directory; its whole family is asked.
        document: id of the document, `<corpus>/<file>:<line>`; or
        number: its place in the pair, from 0, where there is no table of ids; `source` is needed then.
        source: name of its source in the run's mixtures; by default every one that has a table is looked through.

    Returns:
        document (id or None), source, index, tokens, and `runs`: of each, name, directory, state, a `note` where
        nothing can be said, and `readings`: step (from 1), tokens (of the run, before that step), position (since the
        root of the tree), epoch (from 0), window, and whether it is `read`, `planned` or `passed over`. Where further
        sources hold a document of that id, `others` has the same of each of them.

    Raises:
        CheckpointError: no run there, or its files cannot be read.
        DataError: no such source or document, or a pair is missing or damaged.
    """
    asked = next((reader for reader in _family(run_dir) if reader.member.asked), None)
    if asked is None:
        raise CheckpointError(f"{run_dir}: not a run directory", "a document is read by runs", "name one of them")
    first, *others = [
        _of_source(_family(run_dir), asked.run.data.paths[name], document, name, place)
        for name, place in _documents(asked.run, document, number, source)
    ]
    return {**first, "others": others}


def _of_source(readers: list[_Reader], prefix: Path, document: str | None, name: str, place: int) -> dict[str, Any]:
    """What one source's document was read by."""
    index = read_index(prefix)
    if not 0 <= place < index.documents:
        raise DataError(f"document {place} of {name} ({prefix})", f"it has documents 0 to {index.documents - 1}")
    for reader in readers:
        reader.source = _source_of(reader.run, name, prefix)
    _fill(readers, index, place)
    return {
        "document": document or id_of(prefix, place),
        "source": name,
        "index": place,
        "tokens": int(index.lengths[place]),
        "runs": [
            {
                "run": reader.run.name, "directory": reader.member.directory, "state": reader.member.state,
                "note": reader.note, "readings": reader.readings,
            }
            for reader in readers
        ],
    }  # fmt: skip


def _family(run_dir: Path) -> list[_Reader]:
    found: list[_Reader] = []
    waiting = list(families(run_dir))
    while waiting:
        member = waiting.pop(0)
        waiting = member.children + waiting
        if member.directory is None or member.state == "missing":
            continue
        directory = Path(member.directory)
        try:
            run = parse_config(RunConfig, read_yaml(directory / CONFIG), str(directory / CONFIG))
        except OctoError as error:
            if member.asked:
                raise CheckpointError(error.what, error.rule, error.fix) from None
            continue
        lineage = (read_json(directory / LINEAGE) or {}) if (directory / LINEAGE).is_file() else {}
        first = lineage.get("first_window", 0)
        found.append(_Reader(member, run, first, blends_of(run.data, first, lineage.get("history", ()))))
    return found


def _documents(run: RunConfig, document: str | None, number: int | None, source: str | None) -> list[tuple[str, int]]:
    paths = run.data.paths
    if source is not None and source not in paths:
        raise DataError(f"no source {source!r} in '{run.name}'", f"its sources are {', '.join(paths)}", "name one")
    if number is not None:
        if source is None and len(paths) > 1:
            raise DataError(f"document {number} of which source?", f"sources are {', '.join(paths)}", "add --source")
        return [(source or next(iter(paths)), number)]
    assert document is not None
    return find_document(document, paths if source is None else {source: paths[source]})


def _source_of(run: RunConfig, name: str, prefix: Path) -> str | None:
    """What a run calls a dataset; by its place, or where that has moved by its name."""
    here = prefix.resolve()
    by_place = [called for called, path in run.data.paths.items() if path.resolve() == here]
    return by_place[0] if by_place else name if name in run.data.paths else None


def _fill(readers: list[_Reader], index: Index, place: int) -> None:
    """The readings of every run; passes over the source are computed once for all runs that cut and draw alike."""
    for reader in readers:
        if reader.source is None:
            reader.note = "does not read this source"
            continue
        dealt = order(reader.blends, reader.last)
        reader.taken = int(np.count_nonzero(dealt.source == dealt.names.index(reader.source)))
        each = windows_per_epoch(index.tokens, reader.run.data.sequence_length)
        reader.passes = max(1, -(-reader.taken // each)) if each else 0
    alike: dict[tuple[int, int], list[_Reader]] = {}
    for reader in readers:
        if reader.source is not None and reader.passes:
            alike.setdefault((reader.run.data.sequence_length, reader.run.data.seed), []).append(reader)
    for group in alike.values():
        epochs = _epochs(group, index)
        for reader in group:
            reader.readings = _readings(reader, epochs, index, place)


def _epochs(group: list[_Reader], index: Index) -> Epochs:
    """As many passes as the longest of some runs needs: from its cache, or computed and thrown away."""
    longest = max(group, key=lambda reader: reader.passes)
    data, digest = longest.run.data, content_digest(index)["index"]
    cache = Path(longest.member.directory or "") / CACHE
    kept = cached_epochs(data.sequence_length, longest.passes, data.seed, digest, cache)
    return kept or shuffled(index, data.sequence_length, longest.passes, data.seed)


def _readings(reader: _Reader, epochs: Epochs, index: Index, place: int) -> list[dict[str, Any]]:
    assert reader.source is not None
    run, batch = reader.run, reader.run.batch.global_batch
    windows, passes = places_of_document(epochs, index, place, reader.blends, reader.source, reader.last)
    done = (reader.member.tokens or 0) // run.tokens_per_step
    rewinds = read_json(Path(reader.member.directory or "") / REWINDS) or []
    over = {step for one in rewinds for step in one.get("passed_over", [])}
    found = []
    for window, epoch in sorted(zip(windows.tolist(), passes.tolist(), strict=True)):
        if window < reader.first:  # its parent read it
            continue
        step = (window - reader.first) // batch + 1
        tokens = (step - 1) * run.tokens_per_step
        state = "passed over" if step in over else "read" if step <= done else "planned"
        position = (reader.member.position or 0) + tokens
        found.append(
            {"step": step, "tokens": tokens, "position": position, "epoch": epoch, "window": window, "state": state}
        )
    return found

"""A sample drawn uniformly within each year, the same for any number of workers and any order of reading.

Every document has a random number that follows from the seed and its id alone, and a year's sample is the documents
with its smallest numbers: a reservoir that can be filled shard by shard. The corpora are gone through once to draw;
only shards that hold drawn documents are opened again, for their texts.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from datatrove.data import Document

from megatron_octo.data.corpora.files import input_path
from megatron_octo.data.corpora.read import Accounts
from megatron_octo.data.curate.parts import (
    Curation,
    Part,
    count,
    left,
    random_number,
    read_shard,
    total,
    write_documents,
)
from megatron_octo.data.engine.code import CURATES, code_of
from megatron_octo.data.engine.inputs import look_at, versions
from megatron_octo.data.engine.stage import Executor, Stage, advance, run_stages
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file, replacing

FORMAT = 1
DRAW, SAMPLE = "draw", "sample"
NO_YEAR = 0

_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)|(?<!\d)(?:19|20)\d\d(?=[01]\d[0-3]\d)")
_DRAWN = np.dtype([("year", "<u2"), ("number", "<u8"), ("place", "<u4")])


def draw_sample(curation: Curation, parts: list[Part], team: Executor) -> dict[str, Any]:
    """Draw and write the sample, shard by shard.

    Returns:
        What was read and drawn in all, by year; and under `parts` the facts of each shard's sample.

    Raises:
        DataError: no document has a year.
    """
    wanted = curation.config.sample
    assert wanted is not None
    own = {"format": FORMAT, "seed": curation.config.seed, "sample": wanted.model_dump(mode="json")}
    own["read"] = reading(curation)
    draw = Stage(DRAW, parts, partial(draw_shard, curation), own, unit="documents")
    drawn = run_stages([draw], curation.work, team)[DRAW]
    years = total(drawn, "years")
    if (wanted.year_field or wanted.year_in_file_names) and not set(years) - {label(NO_YEAR)}:
        where = f"in field {wanted.year_field!r}" if wanted.year_field else "in the name of its file"
        raise DataError(
            f"no document has a year {where}",
            "a sample is drawn uniformly within each year",
            "name the field that holds a year or a date as sample.year_field, or leave it out",
        )
    limits = _limits(curation, parts, wanted.documents_per_year)
    write = Stage(SAMPLE, parts, partial(write_shard, curation, limits), {**own, "limits": limits})
    written = run_stages([write], curation.work, team)[SAMPLE]
    return {
        "accounts": total_accounts(drawn),
        "years": years,
        "drawn": total(written, "drawn"),
        "documents": total(written, "documents"),
        "characters": total(written, "characters"),
        "parts": written,
    }


def reading(curation: Curation) -> dict[str, Any]:
    """What the documents of the corpora follow from, besides the files, and what is written of them."""
    config = curation.config
    settings = config.model_dump(mode="json", include={"corpora", "on_bad_line", "problems", "seed"})
    paths = [input_path(file, where) for where, file in config.problem_files.items() if "heldout" in where]
    seen = [look_at(str(path)) for path in paths]
    heldout = versions(seen, {str(path): hash_file(path) for path in paths})
    return {**settings, "heldout": list(heldout.values()), "code": code_of(CURATES)}


def total_accounts(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What was read in all."""
    return sum((Accounts(**fact["accounts"]) for fact in facts), Accounts()).as_json()


def draw_shard(curation: Curation, part: Part) -> dict[str, Any]:
    """Read a shard once and leave its candidates: of each year those with the smallest numbers."""
    wanted = curation.config.sample
    assert wanted is not None
    accounts, years = Accounts(), {}
    heaps: dict[int, list[tuple[int, int]]] = {}
    keep = [] if wanted.year_field is None else [wanted.year_field]
    of_file = year_of(part.shard.name) if wanted.year_in_file_names else NO_YEAR
    for place, document in enumerate(read_shard(curation, part, accounts, keep)):
        year = year_of(document.metadata.get(wanted.year_field)) if keep else of_file
        count(years, label(year))
        heap, entry = heaps.setdefault(year, []), (-_number(curation, document), place)
        if len(heap) < wanted.documents_per_year:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            heapq.heapreplace(heap, entry)
        advance(1)
    rows = [(year, -number, place) for year, heap in heaps.items() for number, place in heap]
    path = curation.file(DRAW, part.number, ".npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.sort(np.array(rows, _DRAWN), order="place"))
    return {"accounts": accounts.as_json(), "years": years, **left(curation, path)}


def year_of(value: Any) -> int:
    """The first year in a value, such as a date or the name of a crawl; `NO_YEAR` where there is none."""
    found = _YEAR.search(str(value))
    return int(found[0]) if found else NO_YEAR


def label(year: int) -> str:
    """A year as counts name it."""
    return "none" if year == NO_YEAR else str(year)


def _number(curation: Curation, document: Document) -> int:
    return random_number(curation.config.seed, "sample", document.id)


def _limits(curation: Curation, parts: list[Part], wanted: int) -> dict[str, int]:
    """The greatest number that is drawn, by year; memory for one year's sample, not for all candidates."""
    smallest: dict[int, np.ndarray] = {}
    for part in parts:
        drawn = np.load(curation.file(DRAW, part.number, ".npy"))
        for year in np.unique(drawn["year"]).tolist():
            both = [smallest.get(year, np.zeros(0, "<u8")), drawn["number"][drawn["year"] == year]]
            numbers = np.concatenate(both)
            smallest[year] = np.partition(numbers, wanted - 1)[:wanted] if len(numbers) > wanted else numbers
    return {label(year): int(numbers.max()) for year, numbers in sorted(smallest.items())}


def write_shard(curation: Curation, limits: dict[str, int], part: Part) -> dict[str, Any]:
    """Write the texts of a shard's drawn documents for the judge."""
    found = np.load(curation.file(DRAW, part.number, ".npy"))
    bounds = np.array([limits[label(year)] for year in found["year"].tolist()], "<u8")
    found = found[found["number"] <= bounds]
    years = dict(zip(found["place"].tolist(), found["year"].tolist(), strict=True))
    drawn: dict[str, int] = {}
    facts = {"characters": 0}

    def records() -> Iterator[dict[str, Any]]:
        if not years:
            return
        last = max(years)
        for place, document in enumerate(read_shard(curation, part)):
            if place in years:
                count(drawn, label(years[place]))
                facts["characters"] += len(document.text)
                yield {"id": document.id, "year": years[place], "text": document.text}
            if place == last:
                return

    path = curation.file(SAMPLE, part.number, ".jsonl.zst")
    return {**write_documents(path, records()), **facts, "drawn": drawn, **left(curation, path)}

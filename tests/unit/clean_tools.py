"""Corpora of a few documents as the stages of the cleaning read them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.clean.removals import Removal, read_removals
from megatron_octo.data.clean.stages import clean_stages
from megatron_octo.data.engine.executors import InProcess
from megatron_octo.data.engine.inputs import look_at, versions
from megatron_octo.data.engine.stage import run_stages
from megatron_octo.files import hash_file


@dataclass(frozen=True)
class Held:
    """A shard that is its documents."""

    corpus: str
    number: int
    path: str
    texts: tuple[str, ...]


def read_held(shard: Held) -> list[Document]:
    """Its documents; module-level, so that it travels to other processes."""
    return [Document(text, f"{shard.path}:{line}") for line, text in enumerate(shard.texts, start=1)]


def shards_of(corpora: dict[str, list[list[str]]]) -> dict[str, list[Held]]:
    """Shards from texts: corpus -> shards -> documents."""
    return {
        name: [Held(name, number, f"{name}/{number}.jsonl", tuple(texts)) for number, texts in enumerate(shards)]
        for name, shards in corpora.items()
    }


def config_of(**changes: Any) -> DataBuildConfig:
    """A build of one corpus, with the given settings."""
    values = {"tokenizer": {"train": {"vocabulary_size": 300}}, "corpora": {"a": {"path": "a"}}, **changes}
    return parse_config(DataBuildConfig, values, "test")


def clean(
    corpora: dict[str, list[list[str]]], work: Path, executor: Any = None, /, **changes: Any
) -> dict[str, Removal]:
    """Clean corpora; returns the removals by the document's id."""
    shards, found, config = shards_of(corpora), {}, config_of(**changes)
    paths = [Path(one.path) for one in (config.decontaminate.against.values() if config.decontaminate else ())]
    seen = [look_at(str(path)) for path in paths if path.is_file()]
    known = versions(seen, {file.path: hash_file(Path(file.path)) for file in seen})
    run_stages(clean_stages(config, shards, work, known, read_held), work, executor or InProcess())
    for shard in (shard for several in shards.values() for shard in several):
        for removal in read_removals(work, shard):
            assert removal.document == f"{shard.path}:{removal.place + 1}"
            found[removal.document] = removal
    return found


_PEOPLE = ("Mira", "Jonas", "Leyla", "Tomas", "Adaeze", "Pavel", "Noor", "Greta", "Ivo", "Sanna")
_THINGS = ("apples", "books", "cookies", "eggs", "stamps", "pencils", "marbles", "tickets", "shells", "beads")
_PLACES = ("market", "harbour", "school", "orchard", "station", "library", "bakery", "village hall", "theatre")
_SENTENCES = (
    "{who} has {a} {what} and finds {b} more of them on the way to the {where}.",
    "On the way home from the {where}, {who} gives {a} of the {what} to a friend who has only {b}.",
    "Every week {who} brings {a} boxes with {b} {what} each to the {where}, but the last one is always empty.",
    "At the {where} there are {a} times as many {what} as {who} had before breakfast, which was {b}.",
    "{who} sells half of the {what} for ${a} each and keeps the money in a tin at the {where} for {b} days.",
    "Then {who} packs the {what} in rows of {a}, and {b} of them do not fit on the shelf of the {where}.",
)
_ASKED = ("How many {what} does {who} have now?", "How many dollars does {who} get for all of the {what}?",
          "After how many days will {who} have {a} {what} at the {where}?")  # fmt: skip
_FORMULAS = (
    r"What is the sum of all numbers $x$ with $\frac{{x^2 - {a}}}{{{b}}} \le \left(x + {c}\right)$?",
    r"Let $f(x) = {a}x^2 + {b}x - \frac{{{c}}}{{2}}$. Find the product of its roots in terms of $\pi$ and ${c}$.",
    r"The numbers $\sqrt{{{a}}}$, ${b},\!{c}00$ and $\frac{{1}}{{2}}$ are written on a board. Which is the largest?",
)
_SHORT = (
    r"Compute ${a} + {b} \cdot {c}$.", r"Simplify $\sqrt{{{a}{b}{c}}}$.", r"Evaluate $({a}+{b}i){c}-{a}i$.",
    r"What is the remainder of {a}{b} divided by {c}?", r"How many positive divisors does {a}{b}{c} have?",
)  # fmt: skip


def questions(count: int, seed: int = 0) -> list[str]:
    """Questions that differ from each other, of the kinds benchmarks have: word problems, formulas, very short ones."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        fill = {"who": draw.choice(_PEOPLE), "what": draw.choice(_THINGS), "where": draw.choice(_PLACES)}
        kind = draw.choices(("words", "formula", "short"), (6, 3, 2))[0]
        parts = [*draw.sample(_SENTENCES, 3), draw.choice(_ASKED)] if kind == "words" else [
            draw.choice(_FORMULAS if kind == "formula" else _SHORT)
        ]  # fmt: skip
        numbers = ({"a": draw.randint(2, 97), "b": draw.randint(2, 97), "c": draw.randint(2, 97)} for _ in parts)
        found[" ".join(part.format(**fill, **some) for part, some in zip(parts, numbers, strict=True))] = None
    return list(found)


def write_benchmark(path: Path, asked: list[str]) -> dict[str, Any]:
    """A benchmark file of questions; returns its entry for `decontaminate.against`."""
    rows = [{"question": text, "id": f"q{number}"} for number, text in enumerate(asked)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "question": ["question"], "id": "id"}

"""How well the decontamination of a build works: recall and precision on leaks that were planted for it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_octo.config.clean import Decontaminate
from megatron_octo.data.clean.index import LeakIndex
from megatron_octo.data.clean.leaks import is_leak, plant
from megatron_octo.data.clean.questions import Question, all_questions, benchmark_file
from megatron_octo.data.clean.words import Batch
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file

_TOGETHER = 500
_MISSES = 3  # examples of each kind that go the wrong way


@lru_cache(maxsize=2)
def _index(settings: str, files: tuple[tuple[str, int, int], ...], hashes: tuple[tuple[str, str], ...]) -> LeakIndex:
    config = Decontaminate.model_validate_json(settings)
    for path, sha256 in hashes:
        if hash_file(Path(path)) != sha256:
            raise DataError(
                f"{path} is another file here than where the build was started, or changed since",
                "all machines compare with the same questions, those that the manifest names",
                "copy it to every node, or start again when it is complete",
            )
    return LeakIndex(all_questions(config)[0], config)


def index_of(config: Decontaminate, hashes: tuple[tuple[str, str], ...] = ()) -> LeakIndex:
    """The index of all questions of the benchmarks; made once a process, as long as their files stay as they are.

    Args:
        config: benchmarks, and what counts as giving a question away.
        hashes: path and SHA-256 of files that must be these.

    Raises:
        DataError, ConfigError: as `questions.read_questions`.
    """
    paths = [benchmark_file(name, benchmark) for name, benchmark in config.against.items()]
    states = [(str(path), path.stat()) for path in paths if path]
    return _index(
        config.model_dump_json(), tuple((name, found.st_size, found.st_mtime_ns) for name, found in states), hashes
    )


def measure(
    config: Decontaminate, seed: int, sample: int | None = None, hashes: tuple[tuple[str, str], ...] = ()
) -> dict[str, Any]:
    """Plant leaks and near-misses, and count which are found.

    Args:
        config: benchmarks, and what counts as giving a question away.
        seed: of what is planted.
        sample: questions of each benchmark; all by default.
        hashes: as for `index_of`.

    Returns:
        `leaks`: kind -> benchmark -> planted and found; `near_misses`: the same with flagged; `recall` of each kind,
        `false_positives` of each kind as a share, `precision` over all that was planted, and `any_ngram`, the same
        three for the rule that one n-gram in common is enough; `wrong`: examples of what went the wrong way.

    Raises:
        DataError, ConfigError: as `questions.read_questions`.
    """
    questions, counts = all_questions(config)
    index = index_of(config, hashes)
    chosen = _sample(questions, seed, sample)
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    wrong: dict[str, list[dict[str, str]]] = defaultdict(list)
    documents = list(plant(chosen, seed, config.ngram - 1))
    for start in range(0, len(documents), _TOGETHER):
        some = documents[start : start + _TOGETHER]
        batch = Batch([document.text for document in some])
        suspects = set(index.suspects(batch))
        for number, document in enumerate(some):
            touched = index.touched(batch[number]) if number in suspects else []
            found = any(map(index.is_leak, touched))
            count = seen[document.kind, document.question.id.partition("/")[0]]
            count.update(planted=1, found=int(found), any=int(bool(touched)))  # a lone bool would stay one
            if found != document.leak and len(wrong[document.kind]) < _MISSES:
                wrong[document.kind].append({"question": document.question.id, "text": document.text[:400]})
    return {
        "benchmarks": counts,
        "questions": len(index.questions),
        "index_bytes": index.bytes,
        "leaks": _table(seen, leaks=True),
        "near_misses": _table(seen, leaks=False),
        **_rates(seen, "found"),
        "any_ngram": _rates(seen, "any"),
        "wrong": dict(wrong),
    }


def _sample(questions: list[Question], seed: int, sample: int | None) -> list[Question]:
    own: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        own[question.id.partition("/")[0]].append(question)
    draw = random.Random(f"{seed}/measure")
    chosen = [draw.sample(several, min(len(several), sample or len(several))) for several in own.values()]
    return [question for several in chosen for question in several]


def _table(seen: dict[tuple[str, str], Counter[str]], leaks: bool) -> dict[str, dict[str, dict[str, int]]]:
    table: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for (kind, benchmark), count in seen.items():
        if is_leak(kind) == leaks:
            table[kind][benchmark] = {"planted": count["planted"], "found": count["found"]}
    return dict(table)


def _rates(seen: dict[tuple[str, str], Counter[str]], rule: str) -> dict[str, Any]:
    planted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for (kind, _), count in seen.items():
        planted[kind] += count["planted"]
        found[kind] += count[rule]
    rates = {kind: found[kind] / planted[kind] for kind in planted}
    right = sum(found[kind] for kind in found if is_leak(kind))
    return {
        "recall": {kind: rate for kind, rate in rates.items() if is_leak(kind)},
        "false_positives": {kind: rate for kind, rate in rates.items() if not is_leak(kind)},
        "precision": right / sum(found.values()) if right else 0.0,
    }


def table_lines(facts: dict[str, Any]) -> list[str]:
    """What `measure` found, as lines of a table for people."""
    lines = [f"{'planted':14}{'benchmark':18}{'documents':>10}{'found':>8}{'share':>9}"]
    for title, side in (("leaks", facts["leaks"]), ("near-misses", facts["near_misses"])):
        lines.append(f"-- {title}")
        for kind, benchmarks in side.items():
            for name, count in benchmarks.items():
                share = count["found"] / count["planted"]
                lines.append(f"{kind:14}{name:18}{count['planted']:>10}{count['found']:>8}{share:>9.4f}")
    recall = ", ".join(f"{kind} {rate:.4f}" for kind, rate in facts["recall"].items())
    return [
        *lines,
        f"recall: {recall}",
        f"precision: {facts['precision']:.4f} (one common n-gram as the rule: {facts['any_ngram']['precision']:.4f})",
        *absent_line(facts),
    ]


def absent_line(facts: dict[str, Any]) -> list[str]:
    """A line that names the benchmarks whose files are absent; none where all are there.

    Args:
        facts: `benchmarks`: questions by name, None where there is no file.
    """
    absent = [name for name, count in (facts.get("benchmarks") or {}).items() if count is None]
    return [f"not compared, for their files are absent: {', '.join(absent)}"] if absent else []

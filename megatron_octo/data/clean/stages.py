"""The stages of a build that find what to leave out: they end with one file of removals a shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_octo.config.data import DataBuildConfig, expand_path
from megatron_octo.data.clean.decide import decide
from megatron_octo.data.clean.questions import benchmark_file, located
from megatron_octo.data.clean.tasks import (
    EXAMPLES,
    Bucket,
    Cleaning,
    Part,
    find_duplicates,
    join_clusters,
    look,
    measure_recall,
    search_bucket,
)
from megatron_octo.data.corpora.shard import reading_of, real_path
from megatron_octo.data.engine.code import CLEANS, code_of
from megatron_octo.data.engine.inputs import Version
from megatron_octo.data.engine.stage import Stage

FORMAT = 6
"""Part of what every stage is made from: raised when the same settings and inputs give another result."""

RECALL, SIGNATURES, DUPLICATES, BUCKETS, CLUSTERS, REMOVALS = (
    "recall", "signatures", "duplicates", "buckets", "clusters", "removals"
)  # fmt: skip


def clean_stages(
    config: DataBuildConfig,
    shards: dict[str, list[Any]],
    work: Path,
    versions: Mapping[str, Version],
    read: Callable[[Any], Iterable[Any]] | None = None,
) -> list[Stage]:
    """The stages that find duplicates and leaks; none where the build asks for neither.

    A document that gives a question away is left out for that alone, and nothing is a duplicate of it. Of documents
    that are the same the first in the order of `compared` and of places is kept. Two renderings of one file are not
    compared: what is left out of the first is left out of all, so that they have the same items.

    Args:
        config: the build. The world's text is not cleaned: it has no shard with a path.
        shards: of each corpus.
        work: work directory of the build.
        versions: of the input files by path; names and sizes of the stages do not depend on them.
        read: opens a shard: yields its documents, the same ones at every reading; by default its `ShardReader`.

    Returns:
        In order: `recall` (facts: as `measure.measure`), `signatures`, `duplicates`, `buckets`, `clusters`, `removals`
        (facts: `removed`, how many by reason, `leaks` by benchmark, and `examples`), each where it is needed.

    Raises:
        DataError: the file of a benchmark is absent and may not be.
        ConfigError: its path names an environment variable that is not set.
    """
    same, leaks = config.deduplicate, config.decontaminate
    if same is None and leaks is None:
        return []
    found = compared(config, shards)
    alike = _renderings(config, found)
    parts = [Part(number, shard, versions.get(shard.path), alike[number]) for number, shard in enumerate(found)]
    paths = {name: benchmark_file(name, one) for name, one in (leaks.against if leaks else {}).items()}
    hashes = tuple(
        (str(path.absolute()), versions[str(path)].sha256) for path in paths.values() if str(path) in versions
    )
    here = config.model_copy(update={"decontaminate": located(leaks)}) if leaks else config
    cleaning = Cleaning(here, work, read or partial(open_shard, config), hashes)
    benchmarks = {name: versions.get(str(path)) for name, path in paths.items()}
    settings = config.model_dump(mode="json", exclude={"tokenizer", "index"})
    own = {
        "format": FORMAT, "code": code_of(CLEANS), "settings": settings,
        "benchmarks": benchmarks, "heldout": _heldout(config, versions),
    }  # fmt: skip
    whole = {**own, "shards": parts}  # with their names: what is left out says of which document it is a copy

    def stage(name: str, tasks: list[Any], work: Callable[[Cleaning, Any], dict[str, Any]], made_from: Any) -> Stage:
        return Stage(name, tasks, partial(work, cleaning), made_from)

    stages = [stage(RECALL, [config.seed], measure_recall, own)] if leaks and leaks.measure else []
    stages.append(stage(SIGNATURES, parts, look, own))
    if same and same.exact:
        tasks = [Bucket(number, len(parts)) for number in range(same.partitions)]
        stages.append(stage(DUPLICATES, tasks, find_duplicates, whole))
    if same and same.near:
        tasks = [Bucket(number, len(parts)) for number in range(same.near.buckets)]
        stages += [stage(BUCKETS, tasks, search_bucket, whole), stage(CLUSTERS, [None], join_clusters, whole)]
    return [*stages, stage(REMOVALS, parts, decide, whole if same else own)]


def compared(config: DataBuildConfig, shards: Mapping[str, list[Any]]) -> list[Any]:
    """The shards that are cleaned, in the order in which their documents are kept: here alone it is decided.

    Corpora with a token budget come last, so that none of them takes a document from a corpus that is read whole and
    then leaves it beyond its budget. Otherwise it is the order of the build. The world's text has no path, and is not
    compared.
    """
    limited = [name for name in shards if config.budgets.get(name) is not None]
    names = [*(name for name in shards if name not in limited), *limited]
    return [shard for name in names for shard in shards[name] if shard.path]


def _renderings(config: DataBuildConfig, shards: list[Any]) -> list[tuple[int, ...]]:
    """For each shard the numbers of all that have its items, in whatever rendering; most have itself alone."""
    groups: dict[Any, list[int]] = {}
    for number, shard in enumerate(shards):
        corpus = config.corpora.get(shard.corpus)
        items = (reading_of(corpus), real_path(shard.path), getattr(shard, "part", None)) if corpus else number
        groups.setdefault(items, []).append(number)
    of = {number: tuple(group) for group in groups.values() for number in group}
    return [of[number] for number in range(len(shards))]


def clean_facts(
    config: DataBuildConfig, facts: dict[str, list[dict[str, Any]]], shards: dict[str, list[Any]]
) -> dict[str, Any] | None:
    """What the stages found, for a manifest and a report.

    Args:
        config: the build.
        facts: of all stages of a build, by stage.
        shards: as `clean_stages` got them.

    Returns:
        `corpora`: corpus -> documents, `removed` by reason and `leaks` by benchmark, over all its shards, also those
        that a token budget makes needless; `examples` of removals, at most three of each reason; `touched`, documents
        that agree with a question but not enough to be a leak, and examples of these; `benchmarks`, their questions,
        None where the file is absent; `recall`, where it was measured.
        None where nothing was cleaned.
    """
    if REMOVALS not in facts:
        return None
    examples: dict[str, list[Any]] = {}
    found = compared(config, shards)
    cleaned = {shard.corpus for shard in found}
    corpora: dict[str, dict[str, Any]] = {
        name: {"documents": 0, "removed": Counter(), "leaks": Counter()} for name in shards if name in cleaned
    }
    for shard, seen, left in zip(found, facts[SIGNATURES], facts[REMOVALS], strict=True):
        own = corpora[shard.corpus]
        own["documents"] += seen["documents"]
        own["removed"].update(left["removed"])
        own["leaks"].update(left["leaks"])
        for removal in left["examples"]:
            examples.setdefault(removal["reason"], []).append(removal)
    touched = [example for seen in facts[SIGNATURES] for example in seen.get("touched_examples", [])]
    return {
        "corpora": {
            name: {**own, "removed": dict(own["removed"]), "leaks": dict(own["leaks"])} for name, own in corpora.items()
        },
        "examples": {reason: several[:EXAMPLES] for reason, several in examples.items()},
        "touched": sum(seen.get("touched", 0) for seen in facts[SIGNATURES]),
        "touched_examples": touched[:EXAMPLES],
        "benchmarks": next((seen.get("benchmarks") for seen in facts[SIGNATURES]), None),
        "recall": facts[RECALL][0] if RECALL in facts else None,
    }


def open_shard(config: DataBuildConfig, shard: Any) -> Iterable[Any]:
    """The documents of a shard as the build reads them."""
    from megatron_octo.data.corpora.read import ShardReader

    return ShardReader(config, shard)


def _heldout(config: DataBuildConfig, versions: Mapping[str, Version]) -> Version | None:
    """The version of the held-out problems: readers leave out the records that ask them."""
    heldout = config.problems.heldout
    file = heldout.file if heldout else None
    return versions.get(str(expand_path(file.path, "problems.heldout.file.path"))) if file else None

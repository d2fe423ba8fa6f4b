"""Build a data directory: tokenizer, indexed sources, problems, and a manifest that vouches for all of it.

Everything is made beside its place, in `.work`, shard by shard, and each shard leaves a record. A build that was
killed starts again with the same command and repeats what has no record. What is complete gets its place by renaming.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import differences
from megatron_octo.data.clean.stages import clean_facts
from megatron_octo.data.corpora.files import unread_files
from megatron_octo.data.corpora.problems import (
    Problem,
    build_world,
    heldout_questions,
    problem_file,
    problems,
    without_heldout,
)
from megatron_octo.data.engine.executors import executor_of
from megatron_octo.data.engine.inputs import tell_copies
from megatron_octo.data.engine.manifest import broken_parts, intact_sources, make_manifest, verify_data
from megatron_octo.data.engine.plan import BEYOND, JOIN, TOKENIZER, Plan
from megatron_octo.data.engine.publish import (
    MANIFEST,
    RESULT,
    REVISIONS,
    WORK,
    finish_publishing,
    keep_revisions,
    publish,
)
from megatron_octo.data.engine.stage import FILES, Executor, run_stages, wait_for_tasks
from megatron_octo.data.engine.tokenizer import tell_smaller
from megatron_octo.data.index.table import pair_files
from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem, machine_problem
from megatron_octo.files import LOCK, hash_file, hold, read_json, write_json, write_text

_PATIENCE = 3.0  # seconds that workers of a killed build may take to notice
_CLAIM = "build.json"
_NONE_INTACT = "no source is whole, or other versions of the code made them"


def build_data(
    config: DataBuildConfig, out: Path, workers: int | None = None, executor: str = "local",
    tell: Callable[[str], None] = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """Build a data directory, or finish one that was interrupted.

    Args:
        config: what to build.
        out: directory to write: `tokenizer/`, `<source>.bin`, `<source>.idx`, `problems/`, `manifest.json` (last).
        workers: shards worked on at the same time, see `executor_of`; the result does not depend on it.
        executor: `local` or `ray`; the result does not depend on it.
        tell: called, where the directory was finished already, with what had to be done.

    Returns:
        The manifest.

    Raises:
        ConfigError: the directory holds another build (differing fields are named), or a setting is not allowed.
        DataError: an input is missing or broken, changes meanwhile, or ends before its token budget.
        StageFailed: a worker process was killed.
    """
    out = out.absolute()
    executor_of(executor, workers)  # what is wrong or missing is told before anything is written
    build_world(config)
    plan = Plan(config, out)
    not_read = unread_files(config, plan.revisions)
    plan.tell_inputs()
    with only_writer(out, published(config)) as lock, executor_of(executor, workers, lock) as team:
        finish_publishing(out)
        finished = claim(out, config)
        keep_revisions(out, plan.revisions)
        hashes = _hash_inputs(plan, team)
        inputs = plan.inputs_by_field(hashes)
        intact: frozenset[str] = frozenset()
        if finished:
            refuse_other(out, "inputs", finished["inputs"], inputs)
            if is_whole(out):
                shutil.rmtree(out / WORK)
                tell("nothing, for the directory was finished and whole")
                return finished
            intact = intact_sources(out, finished)
            tell(f"repaired {', '.join(broken_parts(out, finished, intact))}")
            if not intact:
                print(f"octo: note: all of {out} is made again: {_NONE_INTACT}", file=sys.stderr)
        copies = {f"corpora.{name}": inputs[f"corpora.{name}"] for name in config.corpora}
        tell_copies(copies, bool(config.deduplicate and config.deduplicate.exact))
        sets = _build_problems(config, out / WORK / RESULT)
        facts = run_stages(plan.stages(hashes, intact), out / WORK, team)
        if intact and facts[TOKENIZER][0]["sha256"] != finished["tokenizer"]["sha256"]:
            raise DataError(
                f"{out}: the tokenizer is another one now than in its manifest",
                "the sources that are whole would not fit those that are mended",
                f"delete {out / MANIFEST} and start again, which makes all of it anew",
            )
        plan.refuse_changes()
        tell_smaller(config, facts[TOKENIZER][0]["vocabulary"])
        joined = zip(config.sources, facts[JOIN], strict=True)
        sources = {name: found or finished["sources"][name] for name, found in joined}
        cleaning = clean_facts(config, facts, plan.shards)
        if BEYOND in facts and cleaning is not None:
            cleaning["kept_beyond_budget"] = _tell_beyond(facts[BEYOND])
        manifest = make_manifest(config, inputs, facts[TOKENIZER][0], sources, sets, cleaning, not_read)
        manifest[REVISIONS] = plan.revisions
        publish(out, manifest, ["tokenizer", "problems", *_files(facts[JOIN])])
        shutil.rmtree(out / WORK)
    return manifest


def published(config: DataBuildConfig) -> list[str]:
    """Names of what a build puts into its directory."""
    return ["tokenizer", "problems", *(path.name for name in config.sources for path in pair_files(Path(name)))]


def only_writer(out: Path, publishes: Sequence[str] = ()) -> IO[str]:
    """Keep other processes from building into the same directory while the returned context is open.

    Args:
        out: the directory.
        publishes: names of what is going to be put there.

    Raises:
        ConfigError: something of these names is there, and no build of ours has been at work there.
        DataError: another process is at it.
        EnvironmentProblem: the directory cannot be made or written.
    """
    foreign = [name for name in publishes if os.path.lexists(out / name)]
    if foreign and not any((out / mark).exists() for mark in (MANIFEST, WORK, LOCK)):
        raise ConfigError(
            f"{out} has {', '.join(foreign[:6])}{' ...' if len(foreign) > 6 else ''}, and no {MANIFEST} to say whose",
            "the result has the same names and would replace them",
            "name another --out, or move them away",
        )
    try:
        with ExitStack() as stack:
            lock = stack.enter_context(hold(out, _PATIENCE))
            wait_for_tasks(out / WORK, _PATIENCE)
            stack.pop_all()
        return lock
    except BlockingIOError as error:
        raise being_written(out, error) from None
    except OSError as error:
        raise machine_problem(error) or EnvironmentProblem(
            f"{out}: cannot be made ({error.strerror})", "the result is written there", "name another --out"
        ) from None


def being_written(out: Path, error: BlockingIOError) -> DataError:
    """What to tell where a directory is held."""
    return DataError(
        f"{out} is being written by another process (process {error.strerror})",
        "two writers would mix their files",
        "wait for it to end",
    )


def claim(out: Path, config: DataBuildConfig) -> dict[str, Any] | None:
    """Claim the directory for a build, or check that it is claimed for the same one.

    While a build is unfinished its inputs may still be mended: parts made from what changed are made again.

    Returns:
        The manifest of a finished build; None for one that is not.
    """
    finished, settings = read_json(out / MANIFEST), config.model_dump(mode="json")
    if finished is not None:
        refuse_other(out, "settings", _settings(out / MANIFEST, finished), settings)
        return finished
    claimed = read_json(out / WORK / _CLAIM)
    if claimed is not None:
        refuse_other(out, "settings", _settings(out / WORK / _CLAIM, claimed), settings)
    else:
        write_json(out / WORK / _CLAIM, {"settings": settings})
    return None


def _settings(path: Path, found: Any) -> Any:
    if not isinstance(found, dict) or "settings" not in found:
        raise DataError(f"{path} is not what a build writes there", fix="restore it, or name another --out")
    return found["settings"]


def refuse_other(out: Path, what: str, old: Any, new: Any) -> None:
    """Check that a directory was made from the same values.

    Raises:
        ConfigError: it was not; differing fields are named.
    """
    found = differences({what: old}, {what: new})
    if found:
        raise ConfigError(
            f"{out} holds another build: {'; '.join(found[:6])}{' ...' if len(found) > 6 else ''}",
            "one directory is one build, from settings and inputs that do not change",
            "use another --out, or delete the directory",
        )


def _hash_inputs(plan: Plan, team: Executor) -> dict[str, str]:
    stage = plan.inputs()
    return plan.know(run_stages([stage], plan.build.work, team)[stage.name])


def _files(joined: list[dict[str, Any]]) -> list[str]:
    """Names of the files that joining left in the result."""
    return [Path(name).name for found in joined for name in found.get(FILES, {})]


def _tell_beyond(facts: list[dict[str, Any]]) -> dict[str, int]:
    """Documents of each corpus that were left out for a copy which a token budget leaves out too; said aloud."""
    lost: dict[str, int] = {}
    for found in facts:
        lost[found["corpus"]] = lost.get(found["corpus"], 0) + found["lost"]
    for name, number in lost.items():
        if number:
            print(
                f"octo: note: {name}: {number} documents are left out as duplicates of documents that lie beyond the "
                "token budget of their own corpus, so that neither is in the data; of corpora with a budget the one "
                "named first keeps its documents",
                file=sys.stderr,
            )
    return {name: number for name, number in lost.items() if number}


def is_whole(out: Path) -> bool:
    """Whether every file of a finished build is as its manifest says."""
    try:
        verify_data(out)
    except DataError:
        return False
    return True


def _build_problems(config: DataBuildConfig, result: Path) -> dict[str, dict[str, Any]]:
    """Write the problems of both splits; returns their counts and hashes, and what was skipped of their files."""
    sets: dict[str, list[Problem]] = {
        "train": without_heldout(problems(config, "train"), heldout_questions(config)),
        "heldout": problems(config, "heldout"),
    }
    facts = {}
    for split, found in sets.items():
        path = result / "problems" / f"{split}.jsonl"
        write_text(path, "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in found))
        facts[split] = {"count": len(found), "sha256": hash_file(path)}
        read = problem_file(config, split)
        if read is not None and read.skipped:
            facts[split] |= {"skipped": read.skipped, "first_skipped": read.first}
    return facts

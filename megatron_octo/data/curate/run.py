"""A curation from its corpora to a curated corpus, step by step; what was done is not done again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

from megatron_octo.config.curate import CurateConfig, Question, Step
from megatron_octo.config.load import differences
from megatron_octo.data.corpora.files import unread_files
from megatron_octo.data.corpora.shard import Shard, list_shards, numbered
from megatron_octo.data.curate.classify import CORPUS, classify_corpora, keep_documents, named_model, refuse_all_kept
from megatron_octo.data.curate.client import key_of
from megatron_octo.data.curate.judge import JUDGED, judge_sample
from megatron_octo.data.curate.parts import Curation, Part
from megatron_octo.data.curate.prompts import Asked, asked_of
from megatron_octo.data.curate.refine import refine_corpora
from megatron_octo.data.curate.sample import draw_sample
from megatron_octo.data.curate.train import refuse_worthless, train_classifier
from megatron_octo.data.engine.build import only_writer
from megatron_octo.data.engine.code import CURATES, LEARNS, code_of
from megatron_octo.data.engine.executors import executor_of
from megatron_octo.data.engine.inputs import (
    InputFile,
    inputs_stage,
    lines_of,
    look_at,
    look_at_shards,
    refuse_change,
    versions,
)
from megatron_octo.data.engine.publish import (
    MANIFEST,
    REVISIONS,
    finish_publishing,
    keep_revisions,
    known_revisions,
    publish,
)
from megatron_octo.data.engine.stage import FILES, Executor, run_stages
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.files import hash_file, read_json


def curate(config: CurateConfig, out: Path, until: str | None = None, workers: int | None = None) -> dict[str, Any]:
    """Curate corpora, or go on with a curation that was interrupted.

    Settings may be changed between one call and the next until the curation is finished: what does not follow from a
    changed one is kept, and so is every answer to a question that stays the same.

    Args:
        config: what to curate, and how.
        out: directory to write: `corpus/` (documents, with the ids of their sources), `judged/`, `classifier/`,
            `manifest.json` (last), and `answers/` from the first answer on.
        until: the last step to do; all by default, and only then the result is published.
        workers: shards read at the same time; the result does not depend on it.

    Returns:
        What each step found; the manifest where all are done.

    Raises:
        ConfigError: a setting is not allowed, the directory holds another curation, or there is no key.
        DataError: an input is missing or broken, changes meanwhile, or nothing is kept; the judge cannot be read, or
            the classifier chooses nothing.
        EnvironmentProblem: an endpoint is down or refuses what it is asked.
        StageFailed: a worker process was killed.
    """
    out = out.absolute()
    if until is not None and until not in config.steps:
        known = until in get_args(Step)
        raise ConfigError(
            f"step {until!r} {'is not in the file' if known else 'does not exist'}",
            f"its steps are {', '.join(config.steps)}",
            "name one of them",
        )
    executor_of("local", workers)
    revisions = known_revisions(out)
    files, parts = _look(config, revisions)
    unread_files(config, revisions)
    questions = _questions(config)
    with only_writer(out, (CORPUS, JUDGED, "classifier")) as lock, executor_of("local", workers, lock) as team:
        finish_publishing(out)
        curation, finished = Curation(config, out), read_json(out / MANIFEST)
        if finished is not None and not isinstance(finished, dict):
            raise DataError(
                f"{out / MANIFEST} is not what a curation writes there", fix="restore it, or name another --out"
            )
        keep_revisions(out, revisions)
        inputs, lines = _hash_inputs(curation, files, team)
        if finished is not None:
            _refuse_other(out, finished, {"settings": _settings(config, questions), "inputs": inputs})
            _refuse_altered(out, finished)
            shutil.rmtree(curation.work)
            return finished
        known = versions(files.values(), {files[name].path: facts["sha256"] for name, facts in inputs.items()})
        shards = numbered([part.shard for part in parts], lines)
        parts = [Part(number, shard, known[shard.path]) for number, shard in enumerate(shards)]
        found = _steps(curation, parts, until or config.steps[-1], team)
        for file in files.values():
            refuse_change(file)
        if until is not None and until != config.steps[-1]:
            return {step: _without(facts, FILES) for step, facts in found.items()}
        manifest = _manifest(curation, inputs, _settings(config, questions), found)
        manifest[REVISIONS] = revisions
        publish(out, manifest, sorted({name.partition("/")[0] for name in manifest["files"]}))
        shutil.rmtree(curation.work)
    return manifest


def _look(config: CurateConfig, revisions: dict[str, str]) -> tuple[dict[str, InputFile], list[Part]]:
    """Every input file as it is now, by corpus and name within it or by its field, and all shards."""
    shards = [shard for name in config.corpora for shard in list_shards(config, name, revisions)]
    if not shards:
        raise DataError("the corpora hold no files", fix="look at their paths")
    files = {_name(shard): shard.path for shard in shards}
    own = look_at_shards(shards)
    if config.classify is not None and config.classify.model is not None:
        files["classify.model"] = str(named_model(config.classify.model))
    looked = {name: own.get(path) or look_at(path) for name, path in files.items()}
    return looked, [Part(number, shard, None) for number, shard in enumerate(shards)]


def _name(shard: Shard) -> str:
    return f"{shard.corpus}/{shard.name}"


def _questions(config: CurateConfig) -> dict[str, Asked]:
    """What is asked of models, by step; read at the start, for prompts that are not there."""
    found = {}
    for step in ("judge", "refine"):
        question: Question | None = getattr(config, step)
        if question is not None:
            found[step] = asked_of(question, config.endpoint_of(question).model, step)
    return found


def _settings(config: CurateConfig, questions: dict[str, Asked]) -> dict[str, Any]:
    """Everything the result follows from besides the inputs: not how hard an endpoint is pressed, nor where it is.

    Nor the limits of what is refused.
    """
    limits = {"least_informedness", "most_kept"}
    own = {"endpoint": True, "classify": limits, "judge": {"endpoint", "prompt"}, "refine": {"endpoint", "prompt"}}
    settings = config.model_dump(mode="json", exclude=own)
    return {**settings, "asked": {step: asked.as_json() for step, asked in questions.items()}}


def _hash_inputs(
    curation: Curation, files: dict[str, InputFile], team: Executor
) -> tuple[dict[str, dict[str, Any]], dict[str, list[int]]]:
    """Sizes and hashes of the input files, by name, and lines before their parts, by path."""
    stage = inputs_stage(files.values())
    facts = run_stages([stage], curation.work, team)[stage.name]
    hashes = {file.path: found["sha256"] for file, found in zip(stage.tasks, facts, strict=True)}
    inputs = {name: {"bytes": file.bytes, "sha256": hashes[file.path]} for name, file in files.items()}
    return inputs, lines_of(stage, facts)


def _refuse_other(out: Path, finished: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = differences({name: finished[name] for name in wanted}, wanted)
    if found:
        raise ConfigError(
            f"{out} holds another curation: {'; '.join(found[:6])}{' ...' if len(found) > 6 else ''}",
            "one directory is one curation, from settings and inputs that do not change once it is finished",
            "use another --out; answers of the same questions are found there if you copy answers/",
        )


def _refuse_altered(out: Path, finished: dict[str, Any]) -> None:
    for name, facts in finished["files"].items():
        if not (out / name).is_file() or hash_file(out / name) != facts["sha256"]:
            raise DataError(
                f"{out / name} is not what the manifest says",
                "it was altered or removed after the curation was finished",
                f"delete {out / MANIFEST} and run again: answers are kept",
            )


def _without(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: fact for key, fact in facts.items() if key != name}


def _steps(curation: Curation, parts: list[Part], until: str, team: Executor) -> dict[str, Any]:
    """Do the steps up to one; returns what each found."""
    config, found = curation.config, {}
    steps = config.steps[: config.steps.index(until) + 1]  # type: ignore[arg-type]
    for question in (getattr(config, step) for step in steps if step in ("judge", "refine")):
        key_of(config.endpoint_of(question))  # before hours of work, not after
    for step in steps:
        if step == "sample":
            found[step] = draw_sample(curation, parts, team)
        elif step == "judge":
            found[step] = judge_sample(curation, parts, found["sample"], team)
        elif step == "train":
            found[step] = train_classifier(curation, parts, found["judge"], team)
        elif step == "classify":
            if "train" in found:
                refuse_worthless(curation, found["train"])
            found[step] = classify_corpora(curation, parts, team)
        else:
            if "classify" in found:
                refuse_all_kept(curation, found["classify"])
            found[step] = refine_corpora(curation, parts, found.get("classify"), team)
    if "classify" in found and config.refine is None:
        found["keep"] = keep_documents(curation, parts, found["classify"], team)
    for facts in found.values():
        facts.pop("parts", None)
    return found


def _manifest(
    curation: Curation, inputs: dict[str, Any], settings: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    left = sorted(name for facts in found.values() for name in facts.pop(FILES, {}))
    files = {}
    for path in (curation.work / name for name in left):
        name = path.relative_to(curation.result).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    for path in curation.result.rglob("*"):
        if path.is_file() and path.relative_to(curation.result).as_posix() not in files:
            path.unlink()  # of other settings, or of a killed process
    if ("classify" in found or "refine" in found) and not any(name.startswith(f"{CORPUS}/") for name in files):
        raise DataError(
            "nothing is kept: every document was below the threshold or rejected",
            "; ".join(
                f"{step}: {facts.get('rejected', facts.get('below_threshold'))}" for step, facts in found.items()
            ),
            "look at classify.threshold, and at answers/",
        )
    made_by = code_of(tuple(dict.fromkeys(CURATES + LEARNS)))
    return {"versions": made_by, "settings": settings, "inputs": inputs, "steps": found, "files": files}

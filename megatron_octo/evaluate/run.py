"""Evaluate models: prompts, responses, verdicts, scores, one result file a model and set of problems."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_octo
from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.errors import DataError
from megatron_octo.evaluate.generate import Engine, Generation, TransformersEngine, check_model_directory
from megatron_octo.evaluate.grade import Verdict, grade_many
from megatron_octo.evaluate.problems import (
    Problem,
    benchmark_path,
    column,
    read_benchmark,
    read_objects,
    read_problems,
)
from megatron_octo.evaluate.prompts import build_prompt, template
from megatron_octo.evaluate.score import Graded, score
from megatron_octo.evaluate.symbolic import require_math_verify
from megatron_octo.files import hash_file, hash_json, write_text
from megatron_octo.progress import Progress

_SHOWN = 8  # responses quoted in a result
_BOUND_TO_PLACE = ("models", "out", "threads", "problems", "benchmarks", "benchmark_root", "max_new_tokens")


@dataclass(frozen=True)
class ProblemSet:
    """A named set of problems; `problems` is None when the benchmark's file is absent."""

    name: str
    path: Path
    problems: list[Problem] | None


def evaluate_models(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Evaluate every model on every set of problems; what an earlier call finished is read back, not redone.

    Args:
        config: the evaluation.

    Returns:
        Result by name: LABEL for the problems file, LABEL.BENCHMARK for a benchmark. Each is also in OUT/NAME.json,
        with every response in OUT/NAME.responses.jsonl.

    Raises:
        OctoError: a bad model directory, problem file or template; nothing is written for that model.
    """
    template(config.template)
    require_math_verify()
    sets = _problem_sets(config)
    for directory in config.models.values():
        check_model_directory(directory)
    config.out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is known before hours of answering
    total = sum(_responses(config, each) for each in sets) * len(config.models)
    results: dict[str, dict[str, Any]] = {}
    with Progress("evaluate", total, unit="responses") as bar, _threads(config.threads):
        for label in config.models:
            results.update(_evaluate_model(config, label, sets, bar))
    return results


def grade_file(path: Path, require_stop: bool = True) -> dict[str, Any]:
    """Grade a file of {"response", "answer", "stopped"} lines.

    Args:
        path: jsonl file; `stopped` may be missing when it is not required.
        require_stop: whether a response that did not stop earns nothing.

    Returns:
        file, sha256, n, accuracy, low, high (95% Wilson interval over lines), format_rate, stop_rate, verdicts.

    Raises:
        DataError: a missing column or file, a value of the wrong type, no lines.
    """
    require_math_verify()
    cases = [_case(row, where, require_stop) for where, row in read_objects(path)]
    if not cases:
        raise DataError(f"{path}: holds no line", "an accuracy over nothing is not 0%", "check the file")
    verdicts = grade_many(cases, require_stop=require_stop)
    graded = [Graded(str(line), verdict, 0, cases[line][2]) for line, verdict in enumerate(verdicts)]
    scores = score(graded)
    kept = ("accuracy", "low", "high", "correct", "format_rate", "stop_rate", "verdicts")
    return {"file": str(path), "sha256": hash_file(path), "n": len(cases), **{key: scores[key] for key in kept}}


def _case(row: dict[str, Any], where: str, require_stop: bool) -> tuple[str, str, bool]:
    stopped = column(row, "stopped", where) if require_stop else row.get("stopped", True)
    if not isinstance(stopped, bool):
        raise DataError(f"{where}: stopped = {stopped!r}", "it is true or false", "mend the line")
    response = column(row, "response", where)
    if not isinstance(response, str):
        raise DataError(f"{where}: response is {type(response).__name__}", "a response is text", "mend the line")
    return response, str(column(row, "answer", where)), stopped


def _problem_sets(config: EvaluateConfig) -> list[ProblemSet]:
    sets = []
    if config.problems is not None:
        sets.append(ProblemSet("", config.problems, read_problems(config.problems)[: config.limit]))
    for name in config.benchmarks:
        assert config.benchmark_root is not None
        known = read_benchmark(name, config.benchmark_root)
        path = benchmark_path(name, config.benchmark_root)
        sets.append(ProblemSet(name, path, known and known[: config.limit]))
    return sets


def _responses(config: EvaluateConfig, problems: ProblemSet) -> int:
    return len(problems.problems or []) * (config.greedy + config.samples)


def _evaluate_model(
    config: EvaluateConfig, label: str, sets: list[ProblemSet], bar: Progress
) -> dict[str, dict[str, Any]]:
    """All sets of one model; the model is loaded only when a set is not done yet."""
    engine: Engine | None = None
    identity = {"label": label, "directory": str(config.models[label]), "sha256": model_hash(config.models[label])}
    results = {}
    for problems in sets:
        name = f"{label}.{problems.name}" if problems.name else label
        if problems.problems is None:
            results[name] = {"name": name, "status": "absent", "model": identity, "missing": str(problems.path)}
            continue
        settings = _settings(config, label, problems, identity["sha256"])
        result = _finished(config.out / f"{name}.json", settings)
        if result is None:
            engine = engine or _engine(config, label)
            result = _evaluate_set(config, name, engine, problems, {"model": identity, "settings": settings}, bar)
        else:
            bar.advance(_responses(config, problems))
        results[name] = result
    return results


def _engine(config: EvaluateConfig, label: str) -> Engine:
    stop = template(config.template).stop
    return TransformersEngine(config.models[label], device=config.device, batch_size=config.batch_size, stop=stop)


def _settings(config: EvaluateConfig, label: str, problems: ProblemSet, model: str) -> dict[str, Any]:
    """Everything the result depends on, and nothing else: a result with equal settings need not be made again."""
    asked = config.model_dump(mode="json", exclude=set(_BOUND_TO_PLACE))
    return {
        **asked,
        "max_new_tokens": config.tokens_for(label),
        "problems_sha256": hash_file(problems.path),
        "model_sha256": model,
        "prompt": template(config.template).text,
        "stop_strings": list(template(config.template).stop),
    }


def _finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier call, when it has the same settings and its responses are still there."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(result, dict) and result.get("settings_sha256") == hash_json(settings)
    return result if same and path.with_suffix(".responses.jsonl").exists() else None


def _evaluate_set(
    config: EvaluateConfig, name: str, engine: Engine, problems: ProblemSet, origin: dict[str, Any], bar: Progress
) -> dict[str, Any]:
    """Generate, grade, score and write one result."""
    started = time.monotonic()
    known = problems.problems or []
    passes: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for kind, samples, temperature in (("greedy", int(config.greedy), 0.0), ("sampled", config.samples, None)):
        if samples:
            heat = config.temperature if temperature is None else temperature
            answered = _answer(config, engine, known, samples, heat, origin["settings"]["max_new_tokens"], bar)
            passes[kind] = {"temperature": heat, **score([graded for graded, _ in answered])}
            rows += [{"pass": kind, **row} for _, row in answered]
    settings = origin["settings"]
    result = {
        "name": name, "status": "done", **origin, "settings_sha256": hash_json(settings),
        "problems": {"set": problems.name or "problems", "path": str(problems.path),
                     "sha256": settings["problems_sha256"], "n_problems": len(known)},
        **passes, "samples": rows[:_SHOWN], "responses": f"{name}.responses.jsonl",
        "versions": _versions(), "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    write_text(config.out / f"{name}.responses.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(config.out / f"{name}.json", json.dumps(result, indent=2) + "\n")
    return result


def _answer(
    config: EvaluateConfig, engine: Engine, problems: list[Problem], samples: int, temperature: float,
    max_new_tokens: int, bar: Progress,
) -> list[tuple[Graded, dict[str, Any]]]:  # fmt: skip
    """Ask every problem `samples` times; returns each response graded and as a row of the responses file."""
    asked = [(problem, sample) for problem in problems for sample in range(samples)]
    prompts = {problem.id: _encode(config, engine, problem) for problem in problems}
    generations = engine.generate(
        [prompts[problem.id] for problem, _ in asked], max_new_tokens, temperature, config.seed, done=_advance(bar)
    )
    cases = [(g.text, problem.answer, g.stopped) for (problem, _), g in zip(asked, generations, strict=True)]
    verdicts = grade_many(cases, require_stop=config.require_stop)
    return [
        (Graded(problem.id, verdict, len(g.token_ids), g.stopped), _row(problem, sample, g, verdict))
        for (problem, sample), g, verdict in zip(asked, generations, verdicts, strict=True)
    ]


def _advance(bar: Progress) -> Callable[[int], None]:
    return lambda count: bar.advance(count)


def _encode(config: EvaluateConfig, engine: Engine, problem: Problem) -> list[int]:
    if config.bos and engine.bos is None:
        raise DataError("bos = true, and the tokenizer has no begin-of-text token", fix="set bos=false")
    return engine.encode(build_prompt(config.template, problem.question, engine.bos if config.bos else None))


def _row(problem: Problem, sample: int, generation: Generation, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": problem.id,
        "sample": sample,
        "question": problem.question,
        "response": generation.text,
        "gold": problem.answer,
        "verdict": verdict.verdict,
        "extracted": verdict.extracted,
        "tokens": len(generation.token_ids),
        "stopped": generation.stopped,
    }


def model_hash(directory: Path) -> str:
    """sha256 over the names and contents of a model directory's weights, configuration and tokenizer."""
    names = sorted(path for pattern in ("*.safetensors", "*.json", "*.model") for path in directory.glob(pattern))
    facts = [(path.name, hash_file(path)) for path in names if path.name != "certificate.json"]
    return hash_json(facts)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "math-verify")
    own = {"megatron_octo": megatron_octo.__version__, "python": platform.python_version()}
    return {**own, **{package: metadata.version(package) for package in packages}}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's CPU threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

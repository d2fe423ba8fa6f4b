"""Problems, prompts, scores and the evaluation's bookkeeping, with a stand-in engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.config.load import parse_config
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.evaluate import run
from megatron_octo.evaluate.generate import Generation, check_model_directory
from megatron_octo.evaluate.grade import Verdict
from megatron_octo.evaluate.problems import Problem, read_benchmark, read_problems
from megatron_octo.evaluate.prompts import TEMPLATES, build_prompt
from megatron_octo.evaluate.score import Graded, effective_trials, score, wilson

REAL_BENCHMARKS = Path(__file__).parents[3] / "shared" / "data" / "eval"


def test_prompts_are_built_by_replacement() -> None:
    assert build_prompt("world", "Is {question} or {0} 5%?") == "Question: Is {question} or {0} 5%?\nAnswer:"
    assert build_prompt("octothinker-simple", "1+1?") == "Question:1+1?\nAnswer:"
    assert build_prompt("world", "q", "<s>").startswith("<s>Question: q")
    complex_prompt = build_prompt("octothinker-complex", "What is $x$?")
    assert complex_prompt.endswith("by the \\boxed{} tag.\nWhat is $x$?\nAssistant:")
    assert TEMPLATES["octothinker-complex"].stop == ("User:", "Assistant:") and not TEMPLATES["world"].stop
    with pytest.raises(ConfigError, match="did you mean 'world'"):
        build_prompt("wrld", "q")


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_problems_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"id": 1, "question": "q\u2028r", "answer": 27.0, "more": 0}])
    assert read_problems(path) == [Problem("1", "q\u2028r", "27")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no problem"),
        ('{"id": 1, "question": "q"}', "line 1: no 'answer'"),
        ('{"id": 1, "question": "q", "answer": null}', "no 'answer'"),
        ('{"id": 1, "question": " ", "answer": "5"}', "empty question"),
        ('{"id": 1, "question": "q", "answer": "5"}\n' * 2, "id '1' is used twice"),
        ("[1]", "holds list"),
        ('{"id"', "line 1: not JSON"),
    ],
)
def test_bad_problem_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=complaint):
        read_problems(path)


def test_benchmarks_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "math500/test.jsonl", [{"problem": "p", "answer": "\\frac12", "unique_id": "u"}])
    write_lines(tmp_path / "olympiad_bench/test.jsonl", [{"question": "p", "final_answer": ["$2$"], "id": 7}])
    assert read_benchmark("math500", tmp_path) == [Problem("u", "p", "\\frac12")]
    assert read_benchmark("olympiad_bench", tmp_path) == [Problem("7", "p", "$2$")]
    assert read_benchmark("gsm8k", tmp_path) is None
    with pytest.raises(ConfigError, match="unknown benchmark"):
        read_benchmark("gsm9k", tmp_path)


@pytest.mark.skipif(not REAL_BENCHMARKS.is_dir(), reason="benchmark files are not here")
@pytest.mark.parametrize(("name", "rows"), [("gsm8k", 1319), ("math500", 500), ("amc23", 40), ("olympiad_bench", 675)])
def test_real_benchmarks_are_complete(name: str, rows: int) -> None:
    problems = read_benchmark(name, REAL_BENCHMARKS)
    assert problems is not None and len(problems) == rows


def test_wilson_against_known_values() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
    for n in (1, 7, 300):
        for hits in range(n + 1):
            low, high = wilson(hits / n, n)
            assert 0 <= low <= hits / n <= high <= 1
    for share, n in ((0.5, 0), (1.1, 5), (math.nan, 5)):
        with pytest.raises(ValueError):
            wilson(share, n)


def graded(problem: str, correct: bool, tokens: int = 4) -> Graded:
    return Graded(
        problem, Verdict(correct, "correct" if correct else "no_answer", "5" if correct else None), tokens, True
    )


def test_scores_of_several_samples() -> None:
    shares = {"a": 4, "b": 2, "c": 0, "d": 2}
    responses = [graded(problem, sample < hits, sample) for problem, hits in shares.items() for sample in range(4)]
    result = score(responses)
    assert (result["accuracy"], result["correct"], result["n_problems"]) == (0.5, 8, 4)
    assert (result["mean_response_tokens"], result["format_rate"], result["stop_rate"]) == (1.5, 0.5, 1.0)
    # Variance between problems 1/6, of their mean 1/24: p(1-p) / that is 6 trials.
    assert result["interval_n"] == pytest.approx(6)
    assert (result["low"], result["high"]) == pytest.approx(wilson(0.5, 6))
    assert result["verdicts"]["no_answer"] == 8
    assert effective_trials([1.0, 0.0, 1.0, 0.0], 4) == 4
    assert effective_trials([0.5, 0.5], 4) == 8
    with pytest.raises(DataError):
        score(responses[1:])
    with pytest.raises(DataError):
        score([])


class AnswersFive:
    """An engine that boxes 5 and stops, except for prompts of odd length, which it answers without end."""

    context = 1000
    made = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def generate(self, prompts_token_ids, max_new_tokens, temperature, seed, done=lambda count: None):
        AnswersFive.made += len(prompts_token_ids)
        done(len(prompts_token_ids))
        return [Generation((1, 2, 3), "\\boxed{5}", len(prompt) % 2 == 0) for prompt in prompts_token_ids]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateConfig:
    """Two models of bytes alone, four problems: two right, one wrong, one cut off."""
    AnswersFive.made = 0
    monkeypatch.setattr(run, "_engine", lambda config, label: AnswersFive())
    for label in ("base", "rl"):
        (tmp_path / label).mkdir()
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / label / name).write_text("{}", encoding="utf-8")
        (tmp_path / label / "model.safetensors").write_bytes(label.encode())
    odd = len(build_prompt("world", "q")) % 2 * "q"
    rows = [("a", odd + "q", "5"), ("b", odd + "qqq", "5"), ("c", odd + "qqqqq", "6"), ("d", odd + "qq", "5")]
    even = 1 - len(build_prompt("world", rows[0][1])) % 2
    assert even, "the first three prompts have even length"
    objects = [{"id": name, "question": question, "answer": answer} for name, question, answer in rows]
    problems = write_lines(tmp_path / "p.jsonl", objects)
    models = {"base": tmp_path / "base", "rl": tmp_path / "rl"}
    return EvaluateConfig(models=models, problems=problems, max_new_tokens=8, samples=2, out=tmp_path / "out")


def test_evaluation_writes_results(config: EvaluateConfig) -> None:
    results = run.evaluate_models(config)
    result = json.loads((config.out / "base.json").read_text())
    assert result == results["base"] and list(results) == ["base", "rl"]
    assert result["greedy"]["accuracy"] == 0.5 and result["greedy"]["n_problems"] == 4
    assert result["greedy"]["verdicts"] == {"correct": 2, "wrong": 1, "no_answer": 0, "not_stopped": 1, "timed_out": 0}
    assert (result["sampled"]["samples_per_problem"], result["sampled"]["temperature"]) == (2, 1.0)
    assert [sample["verdict"] for sample in result["samples"][:4]] == ["correct", "correct", "wrong", "not_stopped"]
    assert len(result["samples"]) == 8 and result["problems"]["n_problems"] == 4
    responses = (config.out / "base.responses.jsonl").read_text().splitlines()
    assert len(responses) == 4 + 8 and json.loads(responses[0])["gold"] == "5"
    assert sorted(path.name for path in config.out.iterdir()) == [
        "base.json", "base.responses.jsonl", "rl.json", "rl.responses.jsonl",
    ]  # fmt: skip


def test_evaluation_resumes_without_counting_twice(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_write = run.write_text

    def dies_at_the_second_model(path: Path, text: str) -> None:
        if path.name == "rl.json":
            raise KeyboardInterrupt
        whole_write(path, text)

    monkeypatch.setattr(run, "write_text", dies_at_the_second_model)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate_models(config)
    monkeypatch.setattr(run, "write_text", whole_write)
    first = (config.out / "base.json").read_bytes()
    assert AnswersFive.made == 24 and not (config.out / "rl.json").exists()

    results = run.evaluate_models(config)
    assert AnswersFive.made == 36, "only the interrupted model is asked again"
    assert (config.out / "base.json").read_bytes() == first
    assert results["rl"]["greedy"]["n_problems"] == 4
    assert len((config.out / "rl.responses.jsonl").read_text().splitlines()) == 12

    run.evaluate_models(config)
    assert AnswersFive.made == 36
    run.evaluate_models(config.model_copy(update={"threads": 1}))
    assert AnswersFive.made == 36, "a setting the answers do not depend on"


def test_a_changed_setting_or_model_is_evaluated_again(config: EvaluateConfig) -> None:
    run.evaluate_models(config)
    only_base = {"models": {"base": config.models["base"]}}
    run.evaluate_models(config.model_copy(update={"seed": 1} | only_base))
    assert AnswersFive.made == 36
    (config.models["rl"] / "model.safetensors").write_bytes(b"trained on")
    only_rl = {"models": {"rl": config.models["rl"]}}
    assert run.evaluate_models(config.model_copy(update=only_rl))["rl"]["status"] == "done"
    assert AnswersFive.made == 48


def test_a_result_without_its_responses_is_made_again(config: EvaluateConfig) -> None:
    run.evaluate_models(config)
    (config.out / "rl.responses.jsonl").unlink()
    run.evaluate_models(config)
    assert AnswersFive.made == 36 and (config.out / "rl.responses.jsonl").exists()


def test_an_absent_benchmark_is_no_zero(config: EvaluateConfig, tmp_path: Path) -> None:
    asked = config.model_copy(update={"benchmarks": ["amc23"], "benchmark_root": tmp_path / "nowhere"})
    results = run.evaluate_models(asked)
    assert results["base.amc23"]["status"] == "absent" and "greedy" not in results["base.amc23"]
    assert results["base"]["status"] == "done"


def test_a_bad_model_is_refused_before_any_work(config: EvaluateConfig, tmp_path: Path) -> None:
    models = {"base": config.models["base"], "gone": tmp_path / "gone"}
    with pytest.raises(DataError, match="no config.json"):
        run.evaluate_models(config.model_copy(update={"models": models}))
    assert AnswersFive.made == 0 and not config.out.exists()


def test_unsafe_model_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="no safetensors weights"):
        check_model_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match="can run code"):
        check_model_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="no tokenizer"):
        check_model_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    check_model_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {}}', encoding="utf-8")
    with pytest.raises(DataError, match="auto_map"):
        check_model_directory(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"problems": None}, "nothing to ask"),
        ({"benchmarks": ["gsm8k"]}, "benchmark_root"),
        ({"greedy": False}, "no answer would be generated"),
        ({"models": {"../x": "m"}}, "file name"),
        ({"max_new_tokens": {"b": 5}}, "no length for model 'a'"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temprature": 0.5}, "did you mean 'temperature'"),
    ],
)
def test_bad_configurations_are_refused(change: dict, complaint: str) -> None:
    values = {"models": {"a": "m"}, "problems": "p.jsonl", "out": "o", **change}
    with pytest.raises(ConfigError, match=complaint):
        parse_config(EvaluateConfig, values, "eval.yaml")


def test_grade_file(tmp_path: Path) -> None:
    rows = [{"response": "\\boxed{5}", "answer": "5", "stopped": True}] * 3 + [
        {"response": "\\boxed{5}", "answer": 5, "stopped": False}
    ]
    result = run.grade_file(write_lines(tmp_path / "r.jsonl", rows))
    assert (result["n"], result["accuracy"], result["verdicts"]["not_stopped"]) == (4, 0.75, 1)
    assert (result["low"], result["high"]) == wilson(0.75, 4)
    assert run.grade_file(tmp_path / "r.jsonl", require_stop=False)["accuracy"] == 1.0
    for bad, complaint in (
        ({"response": "x", "answer": "5"}, "no 'stopped'"),
        ({"response": "x", "stopped": True}, "no 'answer'"),
        ({"response": "x", "answer": "5", "stopped": "no"}, "true or false"),
    ):
        with pytest.raises(DataError, match=complaint):
            run.grade_file(write_lines(tmp_path / "bad.jsonl", [bad]))
    with pytest.raises(DataError, match="holds no line"):
        run.grade_file(write_lines(tmp_path / "empty.jsonl", []))

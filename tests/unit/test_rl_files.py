"""What the stage writes and reads around OpenRLHF: prompts, records, checkpoints to go on from, the exported model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_octo.errors import DataError, StageFailed
from megatron_octo.rl.export import export_model
from megatron_octo.rl.prompts import split_prompts, write_prompts
from megatron_octo.rl.records import EventReader, metric_lines
from megatron_octo.rl.resume import settle
from megatron_octo.rl.tokens import SpecialTexts

PROBLEMS = [{"id": str(n), "question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(5)]

CHARACTERS = SpecialTexts(
    "<|bos|>", ("<|eos|>",), "<|pad|>", SimpleNamespace(encode=lambda text, add_special_tokens: list(text))
)
"""A tokenizer with a token for each character."""


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS), encoding="utf-8")
    return path


def prompts(problems: Path, out: Path, **options) -> list[dict]:
    settings = {"template": "world", "count": 12, "seed": 0, "max_tokens": 1000, "tokenizer": CHARACTERS} | options
    write_prompts(problems, out, **settings)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_prompts_are_complete_texts_in_passes(problems: Path, tmp_path: Path) -> None:
    rows = prompts(problems, tmp_path / "prompts.jsonl")
    assert rows[0].keys() == {"prompt", "label", "datasource"}
    assert {(row["prompt"], row["label"]) for row in rows} == {
        (f"Question: {row['question']}\nAnswer:", row["answer"]) for row in PROBLEMS
    }
    assert Counter(row["label"] for row in rows[:5]) == Counter(row["label"] for row in rows[5:10])
    assert sorted(Counter(row["label"] for row in rows).values()) == [2, 2, 2, 3, 3]


def test_prompts_follow_the_seed(problems: Path, tmp_path: Path) -> None:
    first = prompts(problems, tmp_path / "a.jsonl")
    assert first == prompts(problems, tmp_path / "b.jsonl")
    assert first != prompts(problems, tmp_path / "c.jsonl", seed=1)
    assert [row["label"] for row in first[:5]] != [row["label"] for row in first[5:10]]


def test_overlong_problems_are_left_out(problems: Path, tmp_path: Path) -> None:
    long = {"id": "x", "question": "y" * 500, "answer": "1"}
    with problems.open("a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    out = tmp_path / "prompts.jsonl"
    facts = write_prompts(problems, out, template="world", count=6, seed=0, max_tokens=100, tokenizer=CHARACTERS)
    assert (facts.problems, facts.overlong, facts.prompts) == (6, 1, 6) and "yyy" not in out.read_text()
    with pytest.raises(DataError, match="at most 3 tokens"):
        prompts(problems, out, max_tokens=3)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"question": "a"}', '{"question": "", "answer": "1"}', '{"question": "a", "answer": null}']
)
def test_damaged_problems_are_named(problems: Path, tmp_path: Path, line: str) -> None:
    with problems.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 6"):
        prompts(problems, tmp_path / "prompts.jsonl")
    assert not (tmp_path / "prompts.jsonl").exists()


def test_no_problems(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        prompts(tmp_path / "absent.jsonl", tmp_path / "prompts.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no problem"):
        prompts(tmp_path / "empty.jsonl", tmp_path / "prompts.jsonl")


def test_prompts_are_cut_without_loss(problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "prompts.jsonl"
    rows = prompts(problems, out)
    parts = split_prompts(out, [8, 4], lambda number: tmp_path / str(number) / "prompts.jsonl")
    texts = [path.read_text(encoding="utf-8") for path in parts]
    assert [text.count("\n") for text in texts] == [8, 4] and "".join(texts) == out.read_text(encoding="utf-8")
    assert len(rows) == 12


def test_other_separators_than_the_line_feed_cut_nothing(tmp_path: Path) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "prompts.jsonl"
    rows = [{"id": str(n), "question": f"a\u2028b\x85c\x0cd\re {n}?", "answer": "1"} for n in range(4)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write_prompts(path, out, template="world", count=4, seed=0, max_tokens=1000, tokenizer=CHARACTERS)
    parts = split_prompts(out, [3, 1], lambda number: tmp_path / str(number))
    found = [json.loads(line)["prompt"] for part in parts for line in part.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [part.read_bytes().count(b"\n") for part in parts] == [3, 1]
    assert sorted(found) == [f"Question: {row['question']}\nAnswer:" for row in rows]


def test_a_bos_that_is_not_there_is_refused(problems: Path, tmp_path: Path) -> None:
    assert prompts(problems, tmp_path / "a.jsonl", bos=True)[0]["prompt"].startswith("<|bos|>Question")
    with pytest.raises(DataError, match="no begin-of-text token"):
        prompts(problems, tmp_path / "b.jsonl", bos=True, tokenizer=replace(CHARACTERS, bos=None))
    assert not (tmp_path / "b.jsonl").exists()


def write_events(directory: Path, steps: dict[int, float], start: int, whole: bool = True) -> Path:
    """An event file as torch's SummaryWriter names and frames it."""
    import struct

    from tensorboard.compat.proto.event_pb2 import Event

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"events.out.tfevents.{start}.host.1.0"
    with path.open("ab") as file:
        for step, reward in steps.items():
            for tag, value in (("train/rollout/reward_mean", reward), ("train/rollout/num_samples", 8)):
                event = Event(step=step, wall_time=start + step)
                event.summary.value.add(tag=tag, simple_value=value)
                data = event.SerializeToString()
                file.write(struct.pack("<QI", len(data), 0) + data + b"crc!")
        if not whole:
            file.write(struct.pack("<QI", 999, 0) + b"torn")
    return path


def rewards(reader: EventReader) -> list[float]:
    return [round(values["train/rollout/reward_mean"], 4) for values in reader.read().values()]


def test_events_are_read_as_they_grow(tmp_path: Path) -> None:
    reader = EventReader(tmp_path)
    assert reader.read() == {}
    write_events(tmp_path, {1: 0.25}, start=100)
    assert rewards(reader) == [0.25]
    write_events(tmp_path, {2: 0.5}, start=100)
    assert rewards(reader) == [0.25, 0.5] == rewards(EventReader(tmp_path))


def test_a_torn_record_is_not_read(tmp_path: Path) -> None:
    write_events(tmp_path, {1: 0.25}, start=100, whole=False)
    assert rewards(EventReader(tmp_path)) == [0.25]


def test_a_step_counts_when_its_last_figure_is_there(tmp_path: Path) -> None:
    path = write_events(tmp_path, {1: 0.25, 2: 0.5}, start=100)
    last = len(path.read_bytes())
    write_events(tmp_path, {3: 0.75}, start=100)
    reward_only = path.read_bytes()[: last + (path.stat().st_size - last) // 2 + 1]  # the longer tag comes first
    path.write_bytes(reward_only)
    assert rewards(EventReader(tmp_path)) == [0.25, 0.5]


def test_steps_done_again_replace_the_old(tmp_path: Path) -> None:
    write_events(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}, start=100)
    reader = EventReader(tmp_path)
    reader.read()
    write_events(tmp_path, {3: 0.9, 4: 0.4}, start=200)
    assert rewards(reader) == [0.1, 0.2, 0.9, 0.4] == rewards(EventReader(tmp_path))


def test_steps_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    write_events(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}, start=100)
    reader = EventReader(tmp_path)
    reader.forget_after(1)
    assert rewards(reader) == [0.1]
    write_events(tmp_path, {2: 0.5}, start=200)
    assert rewards(reader) == [0.1, 0.5]


def test_lines_count_over_length_stages() -> None:
    step = {"train/rollout/reward_mean": 0.5, "train/policy_loss": float("nan"), "time": 1.0}
    lines = metric_lines([{1: step, 2: step}, {1: step}], [2, 2])
    assert [(line["step"], line["length_stage"]) for line in lines] == [(1, 0), (2, 0), (3, 1)]
    assert lines[0]["reward"] == 0.5 and lines[0]["policy_loss"] is None
    assert "NaN" not in json.dumps(lines)


def test_small_figures_keep_their_digits() -> None:
    (line,) = metric_lines([{1: {"train/actor_lr": 1.2345678e-9, "time": 1.0}}], [1])
    assert line["learning_rate"] == pytest.approx(1.2345678e-9, rel=1e-6)


def checkpoint(root: Path, role: str, step: int, complete: bool = True) -> None:
    directory = root / role / f"global_step{step}"
    directory.mkdir(parents=True)
    (directory / "weights.pt").write_text("w")
    (root / role / "latest").write_text(f"global_step{step}")
    if complete:
        (directory / "metric.json").write_text("{}")


ROLES = ("_actor", "_critic")


def test_going_on_from_what_both_have(tmp_path: Path) -> None:
    for role, steps in (("_actor", (5, 10, 15)), ("_critic", (5, 10))):
        for step in steps:
            checkpoint(tmp_path, role, step)
    assert settle(tmp_path, ROLES) == 10
    for role in ROLES:
        assert (tmp_path / role / "latest").read_text() == "global_step10"
        assert not (tmp_path / role / "global_step15").exists()


def test_a_half_written_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    for role in ROLES:
        checkpoint(tmp_path, role, 5)
    checkpoint(tmp_path, "_actor", 10)
    checkpoint(tmp_path, "_critic", 10, complete=False)
    assert settle(tmp_path, ROLES) == 5


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert settle(tmp_path / "absent", ROLES) == 0
    checkpoint(tmp_path, "_actor", 5)
    assert settle(tmp_path, ROLES) == 0
    assert not (tmp_path / "_actor").exists()


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A tied model to start from, and what OpenRLHF would save of it."""
    import torch
    from safetensors.torch import save_file

    start, trained = tmp_path / "start", tmp_path / "trained"
    for directory in (start, trained):
        directory.mkdir()
    weights = {"model.embed_tokens.weight": torch.randn(8, 4), "model.norm.weight": torch.ones(4)}
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, start / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **head}, trained / "model.safetensors")
    config = {"tie_word_embeddings": True, "torch_dtype": "bfloat16", "rope_theta": 5e5}
    (start / "config.json").write_text(json.dumps(config))
    (start / "tokenizer.json").write_text("{}")
    (start / "certificate.json").write_text("{}")
    return start, trained


def test_the_export_looks_like_the_start(models: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export_model(models[1], models[0], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert set(weights) == {"model.embed_tokens.weight", "model.norm.weight"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config == {"tie_word_embeddings": True, "torch_dtype": "float32", "rope_theta": 5e5}
    assert not (tmp_path / "model" / "certificate.json").exists()
    assert (tmp_path / "model" / "tokenizer.json").exists()


NAMED = {"untied": "lm_head.weight", "head only": "model.embed_tokens.weight has shape None"}


@pytest.mark.parametrize("damage", ["nan", "shape", "missing", "untied", "head only"])
def test_a_wrong_export_is_refused(models: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(models[1] / "model.safetensors")
    if damage == "nan":
        weights["model.norm.weight"][0] = float("nan")
    elif damage == "shape":
        weights["model.norm.weight"] = torch.ones(5)
    elif damage == "missing":
        del weights["model.norm.weight"]
    elif damage == "untied":
        weights["lm_head.weight"] += 1
    else:
        del weights["model.embed_tokens.weight"]
    save_file(weights, models[1] / "model.safetensors")
    with pytest.raises(StageFailed, match=NAMED.get(damage, "model.norm.weight")):
        export_model(models[1], models[0], tmp_path / "model")
    assert not (tmp_path / "model").exists()

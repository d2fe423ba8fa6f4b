"""What a campaign reads of a stage's progress, and the estimate it makes of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from megatron_octo.campaign.live import _describe
from megatron_octo.progress import PROGRESS_VARIABLE, Progress, describe_facts, terminal_bar


@pytest.fixture
def clock(monkeypatch):
    now = mock.Mock(return_value=1000.0)
    monkeypatch.setattr("megatron_octo.progress.time.time", now)
    return now


def written(monkeypatch, tmp_path: Path, clock, total: float | None, done: float = 0) -> dict:
    """Progress of a stage that works for ten seconds and does ten units in them."""
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "stage.json"))
    with Progress("train", total, "problems", done=done) as bar:
        clock.return_value += 10
        bar.advance(10, loss=0.5)
    return json.loads((tmp_path / "stage.json").read_text())


def test_estimate(monkeypatch, tmp_path, clock):
    assert (
        _describe(written(monkeypatch, tmp_path, clock, 40)) == "train   25%  10 of 40 problems  loss 0.5000  eta 30s"
    )


def test_a_resumed_stage_is_not_taken_for_a_fast_one(monkeypatch, tmp_path, clock):
    assert _describe(written(monkeypatch, tmp_path, clock, 1000, done=900)).endswith("eta 1m30s")


def test_an_unknown_total_gives_no_share_and_no_estimate(monkeypatch, tmp_path, clock):
    assert _describe(written(monkeypatch, tmp_path, clock, None)) == "train  10 problems  loss 0.5000"


def test_a_line_is_not_told_twice(monkeypatch, capsys):
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    with Progress("run", 100, "problems", lines=True) as bar:
        bar.advance(10)
    assert capsys.readouterr().err.count("run: 10.0%") == 1
    with Progress("run", 100, "problems", lines=True) as bar:
        bar.advance(10)
        bar.advance(10)  # within half a minute: told at the end
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["10.0%", "20.0%"]


def test_the_bar_of_a_long_name_with_all_facts_is_one_line():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    facts = {"loss": 2.1234, "learning_rate": 2e-5, "tokens_per_second": 14451, "mfu": 0.41, "validation": 2.2}
    with terminal_bar(console) as bar:
        columns = {"amount": "123B of 200B tokens", "eta": "eta 123h59m", "facts": " · ".join(describe_facts(facts))}
        bar.add_task("llama32_3b_stable_64xh100_fp8_with_a_long_name", total=100, completed=61, **columns)
        rendered = console.render_lines(bar.get_renderable())
    assert len(rendered) == 1
    text = "".join(segment.text for segment in rendered[0])
    assert "llama32_3b_stable_64xh1…" in text and "61%" in text and "eta 123h59m" in text and "loss 2.1" in text


def test_a_long_step_tells_how_long_until_it_is_over():
    assert describe_facts({"loss": 1.0, "step_so_far": 75.0}) == ["loss 1.0000", "this step for 1m15s"]
    assert describe_facts({"loss": 1.0, "step_so_far": None}) == ["loss 1.0000"]

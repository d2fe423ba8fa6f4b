"""What a campaign reads of a stage's progress, and the estimate it makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from megatron_octo.campaign.live import _describe
from megatron_octo.progress import PROGRESS_VARIABLE, Progress


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

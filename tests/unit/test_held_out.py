"""Held-out windows: which tokens they hold, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.data.mix.held_out import HeldOut, open_held_out
from megatron_octo.errors import DataError

DOCUMENTS = [list(range(1, 8)), [8, 9], list(range(10, 24))]  # 23 tokens, 1 to 23 in file order


def run_with(sources: dict, length: int, windows: int, vocabulary: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "out": "tiny",
            "model": {
                "layers": 2,
                "hidden": 32,
                "heads": 4,
                "kv_groups": 2,
                "ffn": 64,
                "vocabulary": vocabulary,
            },
            "data": {"tokenizer": "t", "mixture": {"web": {"path": "web", "weight": 1}}, "sequence_length": length},
            "batch": {"global_batch": 4, "micro_batch": 2},
            "schedule": {"learning_rate": 1e-3, "tokens": "2K"},
            "checkpoint": {"every": "1K"},
            "validation": {"every": "1K", "sources": sources, "windows": windows},
        }
    )


@pytest.fixture
def prefix(tmp_path):
    write_indexed(tmp_path / "held", DOCUMENTS, 30)
    return tmp_path / "held"


def test_windows_follow_the_file_and_meet_at_one_token(prefix):
    held = HeldOut(prefix, 5, 9)
    assert held.count == 4  # the 23rd token is the last one's last label; two are left over
    assert [held[number]["tokens"].tolist() for number in range(4)] == np.arange(1, 21).reshape(4, 5).tolist()
    assert held[3]["labels"].tolist() == [17, 18, 19, 20, 21]
    assert held[0]["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert held[0]["loss_mask"].tolist() == [1.0] * 5
    assert (held.stray_token(22), held.stray_token(21)) == (None, 21)


def test_fewer_windows_are_the_first_ones_and_the_rest_is_masked(prefix):
    held = HeldOut(prefix, 5, 2)
    assert held.count == 2
    assert held[2]["tokens"].tolist() == held[0]["tokens"].tolist()
    assert held[2]["loss_mask"].tolist() == [0.0] * 5


def test_a_short_source_is_used_whole_and_named(prefix):
    opened, short = open_held_out(run_with({"web": prefix}, 5, 9, 30))
    assert opened["web"].count == 4
    assert short == ["validation.sources.web has 4 of the 9 windows asked for; all count"]
    assert open_held_out(run_with({"web": prefix}, 5, 4, 30))[1] == []


@pytest.mark.parametrize(
    ("length", "vocabulary", "said"),
    [
        (23, 30, "validation.sources.web: .* has 23 tokens in 3 documents"),
        (5, 21, "validation.sources.web .* holds token 21, model.vocabulary is 21"),
    ],
)
def test_what_cannot_be_measured_is_refused(prefix, length, vocabulary, said):
    with pytest.raises(DataError, match=said):
        open_held_out(run_with({"web": prefix}, length, 9, vocabulary))


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(DataError, match="validation.sources.math: .*absent.bin does not exist"):
        open_held_out(run_with({"math": tmp_path / "absent"}, 5, 9, 30))

"""What a curation does not train on, and what it does not pay for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from curate_tools import Reply, Request, either, judged, refined, serving, settings, write_corpus

from megatron_octo.config.curate import CurateConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.curate.parts import random_number, read_documents
from megatron_octo.data.curate.run import curate
from megatron_octo.data.engine import code
from megatron_octo.errors import DataError


def _config(folder: Path, server: Any = None, **changes: Any) -> CurateConfig:
    return parse_config(CurateConfig, settings(folder, server, **changes), "file")


def test_an_answer_that_cannot_be_read_is_no_verdict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Else a judge that forgets the last line teaches the classifier that its best documents are bad."""
    write_corpus(tmp_path / "in", 20)
    odd = {3: Reply("I think this is a 4 out of 5"), 4: Reply("It explains the", finish="length")}
    with serving(lambda asked, _: odd.get(asked.document) or judged(asked)) as server:
        facts = curate(_config(tmp_path / "in", server), tmp_path / "out", "judge")["judge"]
    assert facts["unscored"] == {"no final score line": 1, "cut off at max_tokens": 1}
    assert sum(facts["scores"].values()) == 18
    (judgements,) = (tmp_path / "out").rglob("result/judged")
    records = [record for path in judgements.iterdir() for record in read_documents(path)]
    assert len(records) == 18 and all(type(record["score"]) is int for record in records)
    said = capfd.readouterr().err
    assert "judge: 2 answers cannot be read and are left out, such as 'I think this is a 4 out of 5'" in said
    assert "must end with the line 'Final score: <n>'" in said


def test_a_judge_whose_answers_nobody_can_read(tmp_path: Path) -> None:
    """Once more where the answers are there already: a larger sample of the same would be money for nothing."""
    write_corpus(tmp_path / "in", 20)
    words = (
        r"judge: 1 of 20 documents have a score \(no final score line 19\); such as 'All good.*Score: 4'; .*"
        r"'Final score: <n>', n from 0 to 5; fix: let judge.prompt ask for that line"
    )
    with serving(lambda asked, _: judged(asked) if asked.document == 5 else Reply("All good.\nScore: 4")) as server:
        for _ in range(2):
            with pytest.raises(DataError, match=words):
                curate(_config(tmp_path / "in", server), tmp_path / "out", "train")
    assert len(server.requests) == 20
    write_corpus(tmp_path / "more", 300)
    with serving(lambda *_: Reply("Good: 4")) as server, pytest.raises(DataError, match="judge: 0 of 100 documents"):
        curate(_config(tmp_path / "more", server), tmp_path / "early", "judge")
    assert 100 <= len(server.requests) < 130, "the first answers tell enough"
    with (
        serving(lambda *_: Reply("")) as server,
        pytest.raises(DataError, match=r"0 of 20 .*\(empty answer 20\); answers/"),
    ):
        curate(_config(tmp_path / "in", server), tmp_path / "none", "judge")


def _score_at_random(asked: Request) -> Reply:
    """Verdicts that have nothing to do with the texts: nobody can learn them."""
    return Reply(f"Final score: {2 + random_number(1, 'verdict', str(asked.document)) % 2}")


def test_a_classifier_that_tells_nothing_apart_stops_before_anything_more_is_paid(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its figures and where they stand are said as soon as there are some; whoever wants to goes on all the same."""
    write_corpus(tmp_path / "in", 120)
    train = {**settings(tmp_path)["train"], "held_out": 0.5}
    with serving(lambda asked, _: _score_at_random(asked) if "Final" in asked.message else refined(asked)) as server:
        values = {"train": train, "classify": {"threshold": 0.0, "most_kept": 1}}
        report = curate(_config(tmp_path / "in", server, **values), tmp_path / "out", "train")["train"]
        assert (report["kept"], report["recall"], report["informedness"]) == (1, 1, 0)
        said = capfd.readouterr().err
        assert f"keeps 100.0% at threshold 0.0: precision {report['precision']}, recall 1.0, f1" in said
        file = Path(said.rpartition("report: ")[2].strip())
        assert json.loads(file.read_text())["curve"] == report["curve"]
        with pytest.raises(DataError, match=r"hardly better than chance: .*keeps 100.0% .*least_informedness: -1"):
            curate(_config(tmp_path / "in", server, **values), tmp_path / "out")
        assert len(server.requests) == 120
        values["classify"] |= {"least_informedness": -1}
        assert curate(_config(tmp_path / "in", server, **values), tmp_path / "out")["steps"]["refine"]["kept"] == 120


def test_what_keeps_everything_is_not_refined(tmp_path: Path) -> None:
    """Also where the classifier was named, and nothing was held out; nothing follows from the limits but refusals."""
    write_corpus(tmp_path / "in", 60)
    with serving(either) as server:
        values = {"train": {**settings(tmp_path)["train"], "held_out": 0.5}}
        curate(_config(tmp_path / "in", server, **values), tmp_path / "out", "train")
        (model,) = (tmp_path / "out").rglob("model.bin")
        named = {**dict.fromkeys(("sample", "judge", "train")), "classify": {"model": str(model), "threshold": 0.0}}
        asked = len(server.requests)
        with pytest.raises(DataError, match=r"keeps 60 of 60 documents at .*, more than .* = 0.99; .*most_kept: 1"):
            curate(_config(tmp_path / "in", server, **named), tmp_path / "named")
        assert len(server.requests) == asked
        named["classify"] |= {"most_kept": 1}
        made = curate(_config(tmp_path / "in", server, **named), tmp_path / "named")
        named["classify"] |= {"most_kept": 0.5, "least_informedness": 0.9}
        assert curate(_config(tmp_path / "in", server, **named), tmp_path / "named") == made


def _keys(out: Path) -> dict[str, list[str]]:
    """What the records of each stage say they are made from."""
    stages = sorted((out / ".work" / "records").iterdir())
    return {path.name: [json.loads(file.read_text())["made_from"] for file in sorted(path.iterdir())]
            for path in stages}  # fmt: skip


def test_what_other_versions_made_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade in the middle: what follows from the library is made anew, and no question is asked again."""
    write_corpus(tmp_path / "in", 60)
    other: dict[str, str] = {}
    monkeypatch.setattr(code, "_version", lambda name: other.get(name, "1"))
    with serving(either) as server:
        train = {**settings(tmp_path)["train"], "held_out": 0.5}
        any_will_do = {"least_informedness": -1}  # of the classifier; it sees few
        config, keys = _config(tmp_path / "in", server, train=train, classify=any_will_do), []
        for library in (None, "fasttext-numpy2-wheel", "zstandard"):
            other.update({library: "2"} if library else {})
            code.code_of.cache_clear()
            curate(config, tmp_path / "out", "classify")
            keys.append(_keys(tmp_path / "out"))
    monkeypatch.undo()
    code.code_of.cache_clear()
    assert len(server.requests) == 60
    assert {stage for stage in keys[0] if keys[1][stage] != keys[0][stage]} == {"train", "classify"}
    assert {stage for stage in keys[0] if keys[2][stage] != keys[1][stage]} == {"draw", "sample", "judge", "classify"}

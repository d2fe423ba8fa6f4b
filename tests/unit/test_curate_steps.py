"""The parts of a curation: years, scores, words, classes, refined texts, and files that say what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curate_tools import Reply, judged, serving, settings, text_of, write_corpus

from megatron_octo.config.curate import CurateConfig, Refine, Train
from megatron_octo.config.load import load_config, parse_config
from megatron_octo.config.recipes import RECIPES
from megatron_octo.data.curate import train
from megatron_octo.data.curate.answers import Answer
from megatron_octo.data.curate.classify import keep_documents
from megatron_octo.data.curate.judge import NoScore, score_of
from megatron_octo.data.curate.normalize import normalized
from megatron_octo.data.curate.parts import Curation, random_number, read_documents, write_documents
from megatron_octo.data.curate.refine import Unfit, refined_text
from megatron_octo.data.curate.run import _look, curate
from megatron_octo.data.curate.sample import year_of
from megatron_octo.data.engine.executors import InProcess
from megatron_octo.errors import ConfigError, DataError, StageFailed


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Good.\nFinal score: 4", 4),
        ("Final score: 0\n\n  \n", 0),
        ("x\n**Final score: 3**", 3),
        ("x\n**Final Score:** 5/5.", 5),
        ("x\nfinal score: <2>", 2),
        ("Final score: 5\nNo, I take that back.\nFinal score: 1", 1),
    ],
)
def test_scores(answer: str, score: int) -> None:
    assert score_of(answer) == score


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("I cannot help with that.", "no final score line"),
        ("Final score: 4\nThank you!", "no final score line"),
        ("4", "no final score line"),
        *[(f"Final score: {bad}", "score is not a number from 0 to 5") for bad in
          ("6", "-1", "3.5", "<n>", "four", "45", "4-5", "", "4 or 5", "4/10")],
    ],
)  # fmt: skip
def test_no_score(answer: str, why: str) -> None:
    with pytest.raises(NoScore, match=why):
        score_of(answer)


@pytest.mark.parametrize(
    ("value", "year"),
    [
        ("2014-03-01T10:00:00Z", 2014),
        ("crawl-data/CC-MAIN-2017-13/segments/1490218187690", 2017),
        ("20190204", 2019),
        (2016, 2016),
        (None, 0),
        ("", 0),
        ("12014", 0),
        ("1490218187690", 0),
        ({"date": "1999-12-31"}, 1999),
    ],
)
def test_years(value: Any, year: int) -> None:
    assert year_of(value) == year


def test_what_the_classifier_sees() -> None:
    assert normalized("The Sum of 12,345 + x2 = \\frac{1}{2}!\n\tÉtude ﬁn ①") == (
        "the sum of <number> <number> x <number> frac <number> <number> étude fin <number>"
    )
    assert normalized("__label__positive snake_case") == "label positive snake case"
    assert normalized("a" * 100 + " " + "b" * 101 + " --- … ∫") == "a" * 100
    assert len(normalized("word " * 5000).split()) == 1024 and normalized("?! \n") == ""


def test_classes_are_balanced_by_a_draw_of_the_larger() -> None:
    labels, draws = np.array([1, 0, 0, 0, 1, 0], bool), np.array([5, 9, 1, 3, 7, 2], "<u8")
    assert train.balanced(labels, draws, True).tolist() == [True, False, True, False, True, True]
    assert train.balanced(labels, draws, False).all()
    assert train.balanced(~labels, draws, True).tolist() == [True, False, True, False, True, True]


def test_what_is_measured() -> None:
    labels, scores = np.array([1, 1, 1, 0, 0], bool), np.array([0.9, 0.4, 0.1, 0.8, 0.2])
    report = train.measure(labels, scores, 0.4)
    assert (report["precision"], report["recall"], report["f1"], report["kept"]) == (0.6667, 0.6667, 0.6667, 0.6)
    assert report["informedness"] == 0.1667  # two of three, and one of two
    assert [point["threshold"] for point in report["curve"]][:2] == [0.05, 0.1] and len(report["curve"]) == 19
    assert report["curve"][0]["recall"] == 1 and report["curve"][-1] == {
        "threshold": 0.95, "precision": 0.0, "recall": 0.0, "f1": 0.0, "informedness": 0.0, "kept": 0.0,
    }  # fmt: skip


SENT = "A triangle has three sides and three angles. " * 10


@pytest.mark.parametrize(
    ("text", "finish", "why"),
    [
        (SENT, "length", "cut off at max_tokens"),
        ("I'm sorry, but I can't help with that." + SENT, "stop", "refusal"),
        ("Unfortunately, I am unable to." + SENT, "stop", "refusal"),
        ("As an AI language model" + SENT, "stop", "refusal"),
        ("As a language model, I do not do that." + SENT, "stop", "refusal"),
        ("I won't help with that." + SENT, "stop", "refusal"),
        ("Unable to comply with the request." + SENT, "stop", "refusal"),
        ("Sorry but this is not allowed." + SENT, "stop", "refusal"),
        (SENT[: len(SENT) // 4], "stop", "too short"),
        (SENT * 2, "stop", "too long"),
        (SENT + "\0", "stop", "NUL character"),
    ],
)
def test_what_is_no_refined_document(text: str, finish: str, why: str) -> None:
    with pytest.raises(Unfit, match=why):
        refined_text(Answer(text=text, finish=finish), SENT, Refine())


def test_refined_documents() -> None:
    assert refined_text(Answer(text=f"\n{SENT}\n", finish="stop"), SENT, Refine()) == (SENT.strip(), False)
    for opening in ("Here is the refined text:\n\n", "Sure! Here's the document, refined:\n", "Below is the text:\n\n"):
        assert refined_text(Answer(text=opening + SENT, finish="stop"), SENT, Refine()) == (SENT.strip(), True)
    for start in (
        "Here is a theorem.\n",
        "I can show that x = 1.\n",
        "I won't prove it here.\n",
    ):  # documents begin like this
        assert refined_text(Answer(text=start + SENT, finish="stop"), SENT, Refine()) == (start + SENT.strip(), False)


BROKEN = {
    "endpoint.key_variable": ({"endpoint": {"key_variable": "sk-abc123"}}, "no name of an environment variable"),
    "endpoint.url without scheme": ({"endpoint": {"url": "localhost:8000"}}, "url is no http"),
    "a password in the url": ({"endpoint": {"url": "http://me:sk-abc123@host/v1"}}, "holds more than host and path"),
    "a key in the url": ({"endpoint": {"url": "http://host/v1?key=sk-abc123"}}, "holds more than host and path"),
    "attempts": ({"endpoint": {"attempts": 20}}, "attempts must be fewer than failures"),
    "threshold": ({"classify": {"threshold": 1.2}}, "classify.threshold = 1.2"),
    "nan": ({"endpoint": {"timeout_seconds": float("nan")}}, "endpoint.timeout_seconds"),
    "ratio": ({"refine": {"shortest": 2.0}}, "no answer could fit"),
    "two years": ({"sample": {"year_in_file_names": True}}, "in year_field or in the names of files"),
    "extra": ({"judge": {"extra": {"model": "x"}}}, "extra holds 'model'"),
    "judge without sample": ({"sample": None}, "judge needs sample"),
    "train without judge": ({"judge": None}, "train needs judge"),
    "no classifier": ({"train": None}, "classify needs a classifier"),
    "two classifiers": ({"classify": {"model": "m.bin"}}, "classify needs a classifier"),
    "no endpoint": ({"endpoint": None}, "judge asks a model, and no endpoint is named"),
    "no corpora": ({"corpora": {}}, "no corpora"),
    "nothing to do": (dict.fromkeys(("sample", "judge", "train", "classify", "refine")), "no steps"),
    "unknown key": ({"refine": {"temprature": 1}}, "did you mean 'temperature'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_wrong(name: str, tmp_path: Path) -> None:
    changes, words = BROKEN[name]
    values = settings(tmp_path)
    for key, change in changes.items():
        values[key] = {**values[key], **change} if isinstance(change, dict) and change else change
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(CurateConfig, values, "file.yaml")
    assert "abc123" not in str(caught.value)


def test_the_recipe_is_the_papers() -> None:
    config = load_config(CurateConfig, RECIPES / "curation" / "megamath_web_pro_max.yaml")
    assert config.steps == ["sample", "judge", "train", "classify", "refine"]
    assert config.judge.positive_from == 3 and config.judge.temperature == 0 and config.classify.threshold == 0.4
    assert (config.refine.shortest, config.refine.longest) == (0.3, 1.5)
    assert config.endpoint.model == "meta-llama/Llama-3.1-70B-Instruct"
    from megatron_octo.data.corpora.registry import adapter_of

    assert adapter_of(config, "megamath_web").hub == "LLM360/MegaMath"


def _sampled(folder: Path, out: Path, workers: int | None = None, **changes: Any) -> dict[str, Any]:
    return curate(parse_config(CurateConfig, settings(folder, **changes), "file"), out, "sample", workers)["sample"]


def test_a_sample_is_uniform_within_each_year_and_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", 600)
    few = {"documents_per_year": 40, "year_field": "timestamp"}
    with pytest.raises(ConfigError, match="step 'tokenise' does not exist"):
        curate(parse_config(CurateConfig, settings(tmp_path / "in"), "f"), tmp_path / "out", until="tokenise")
    found = _sampled(tmp_path / "in", tmp_path / "a", sample=few)
    assert found == _sampled(tmp_path / "in", tmp_path / "b", 2, sample=few)
    facts = found
    assert facts["years"] == {"2014": 199, "2015": 199, "2016": 200, "none": 2}
    assert facts["drawn"] == {"2014": 40, "2015": 40, "2016": 40, "none": 2}
    assert facts["accounts"]["skipped"] == {"field 'text' is empty": 1}
    assert _sampled(tmp_path / "in", tmp_path / "c", sample=few, seed=8)["drawn"] == facts["drawn"]
    (tmp_path / "in" / "b.parquet").rename(tmp_path / "in" / "CC-MAIN-2017-13.parquet")
    named = {"documents_per_year": 40, "year_in_file_names": True}
    assert _sampled(tmp_path / "in", tmp_path / "e", sample=named)["drawn"] == {"2017": 40, "none": 40}
    with pytest.raises(DataError, match="no document has a year in field 'date'"):
        _sampled(tmp_path / "in", tmp_path / "d", sample={"documents_per_year": 5, "year_field": "date"})
    _check_draw(tmp_path, 40)


def _check_draw(folder: Path, wanted: int) -> None:
    """What was drawn has the smallest numbers of its year, and these are as good as random."""
    drawn = [record for number in range(2) for record in
             read_documents(folder / "a" / ".work" / "sample" / f"{number:05}.jsonl.zst")]  # fmt: skip
    names = {2014 + n % 3: [] for n in range(3)}
    for number in range(2, 600):
        shard, line = ("a.jsonl.gz", number + 1) if number < 300 else ("b.parquet", number - 299)
        names[2014 + number % 3].append(f"web/{shard}:{line}")
    for year, members in names.items():
        best = sorted(members, key=lambda name: random_number(7, "sample", name))[:wanted]
        assert {record["id"] for record in drawn if record["year"] == year} == set(best)
    values = [random_number(seed, "sample", name) / 2**64 for seed in range(50) for name in names[2014]]
    counts = np.histogram(values, 20, (0, 1))[0]
    assert ((counts - len(values) / 20) ** 2 / (len(values) / 20)).sum() < 43.8  # chi squared, 19 degrees, p = 0.001


LINES = "".join(f"__label__{'positive' if n % 2 else 'negative'} common {'sum' if n % 2 else 'cart'} {n % 7}\n" for n in
                range(2000))  # fmt: skip


def test_training_gives_the_same_bytes_and_is_repeated_at_a_lower_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "train.txt"
    lines.write_text(LINES)
    settings = Train(dimension=4, word_ngrams=1, minimum_count=1, rate=0.4, epochs=2)
    for name in ("a", "b"):
        assert train.fit(settings, lines, tmp_path / name, 3) == {"rate": 0.4, "failed_tries": 0}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(DataError, match="no word occurs 5000 times"):
        train.fit(settings.model_copy(update={"minimum_count": 5000}), lines, tmp_path / "c", 3)
    asked = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        given = json.loads(Path(command[-1]).read_text())
        assert given["thread"] == 1
        asked.append(given["lr"])
        return subprocess.CompletedProcess(command, codes[len(asked) - 1], "", "boom\nout of memory")

    monkeypatch.setattr(subprocess, "run", run)
    codes = [9, 9, 0]
    assert train.fit(settings, lines, tmp_path / "c", 3) == {"rate": 0.1, "failed_tries": 2} and asked == [
        0.4,
        0.2,
        0.1,
    ]
    codes = [9] * 8
    with pytest.raises(DataError, match="at every learning rate from 0.4 down to 0.025"):
        train.fit(settings, lines, tmp_path / "d", 3)
    asked, codes = [], [1]
    with pytest.raises(StageFailed, match="training of the classifier failed: out of memory"):
        train.fit(settings, lines, tmp_path / "e", 3)


def _model(folder: Path) -> None:
    """Train m.bin on `lines` of a folder, with zeroed memory, which fastText reads unwritten: see `train.fit`."""
    code = "import fasttext as f, sys; f.train_supervised(sys.argv[1], dim=4, thread=1).save_model(sys.argv[2])"
    command = [sys.executable, "-c", code, str(folder / "lines"), str(folder / "m.bin")]
    subprocess.run(command, check=True, env={**os.environ, "MALLOC_PERTURB_": "255"})


def test_what_is_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match="m.bin is no fastText model"):
        train.Classifier(tmp_path / "m.bin", "1")
    (tmp_path / "lines").write_text(LINES.replace("positive", "good"))
    _model(tmp_path)
    with pytest.raises(DataError, match="knows the labels __label__good, __label__negative"):
        train.Classifier(tmp_path / "m.bin", "2")


class _Odd:
    """A model that says what it is told to."""

    def __init__(self, value: float) -> None:
        self.value = value

    def get_labels(self) -> list[str]:
        return [train.POSITIVE, train.NEGATIVE]

    def predict(self, line: str, k: int) -> Any:
        return (train.NEGATIVE, train.POSITIVE), np.array([0.0, self.value])


def test_probabilities_are_numbers_from_0_to_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train, "_load", lambda path, sha256: _Odd(float(sha256)))
    assert train.Classifier(tmp_path, "1.00001").probability("sum") == 1.0
    assert train.Classifier(tmp_path, "0.25").probability("sum") == 0.25
    assert train.Classifier(tmp_path, "0.25").probability("") == 0.0
    with pytest.raises(DataError, match="a number that is none"):
        train.Classifier(tmp_path, "nan").probability("sum")


def test_equal_texts_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    """Else it is measured on what it has learned by heart. Held-out classes keep their shares."""
    curation = Curation(parse_config(CurateConfig, settings(tmp_path), "file"), tmp_path)
    texts = [text_of(number) for number in range(300)]
    records = [
        {"id": f"web/a:{turn}-{number}", "text": text if turn else text.upper(), "score": 4 if number % 4 else 0}
        for turn in range(3) for number, text in enumerate(texts)
    ]  # fmt: skip
    write_documents(curation.shard_file("judged", 0), iter(records))
    counts = train.write_lines(curation, [0], tmp_path)
    held = {line.split(" ", 1)[1] for line in (tmp_path / "held_out.txt").read_text().splitlines()}
    trained = [line.split(" ", 1)[1] for line in (tmp_path / "train.txt").read_text().splitlines()]
    assert held and not held & set(trained)
    assert 15 < len(held) < 45 and sum(counts["held_out"].values()) == 3 * len(held)
    assert counts["held_out"]["positive"] > 1.5 * counts["held_out"]["negative"]
    assert counts["trained"]["positive"] == counts["trained"]["negative"] == len(trained) // 2


def test_a_question_that_failed_is_asked_again_at_the_next_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "in", 20)
    failing = {3, 4}
    with serving(lambda asked, _: Reply(status=500) if asked.document in failing else judged(asked)) as server:
        values = settings(tmp_path / "in", server)
        values["endpoint"] |= {"attempts": 1}
        config = parse_config(CurateConfig, values, "file")
        first = curate(config, tmp_path / "out", "judge")["judge"]
        assert first["rejected"] == {"no answer: HTTP 500": 2} and len(server.requests) == 20
        assert "judge: 2 documents got no answer and are left out" in capfd.readouterr().err
        failing.clear()
        again = curate(config, tmp_path / "out", "judge")["judge"]
    assert again["rejected"] == {} and sum(again["scores"].values()) == 20 and len(server.requests) == 22
    assert "got no answer" not in capfd.readouterr().err


def test_another_rendering_is_kept_anew(tmp_path: Path) -> None:
    """Also where it has as many documents and the same scores."""
    (tmp_path / "a.jsonl").write_text('{"text": "one", "other": "two"}\n')
    kept = []
    for field in ("text", "other"):
        corpora = {"web": {"path": str(tmp_path / "a.jsonl"), "fields": {"text": field}}}
        curation = Curation(parse_config(CurateConfig, settings(tmp_path, corpora=corpora), "file"), tmp_path)
        _, parts = _look(curation.config, {})
        scores = curation.file("classify", 0, ".npy")
        scores.parent.mkdir(parents=True, exist_ok=True)
        np.save(scores, np.ones(1, np.float32))
        keep_documents(curation, parts, {"model": "m", "accounts": {}, "kept": 1}, InProcess())
        kept += [record["text"] for record in read_documents(curation.shard_file("corpus", 0))]
    assert kept == ["one", "two"]


def test_a_finished_curation_is_kept_from_another_classifier(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", 10)
    (tmp_path / "lines").write_text(LINES)
    _model(tmp_path)
    only = {"classify": {"model": str(tmp_path / "m.bin"), "threshold": 0.0}}
    values = settings(tmp_path / "in", **dict.fromkeys(("sample", "judge", "train", "refine", "endpoint")), **only)
    config = parse_config(CurateConfig, values, "file")
    finished = curate(config, tmp_path / "out")
    assert curate(config, tmp_path / "out") == finished
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes() + b"x")
    with pytest.raises(ConfigError, match=r"holds another curation: inputs.classify.model"):
        curate(config, tmp_path / "out")

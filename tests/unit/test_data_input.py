"""Records -> documents: templates, gold answers, and every way a line can be broken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_octo.config.data import DataBuildConfig, InputFile, expand_path
from megatron_octo.config.load import parse_config
from megatron_octo.data.corpora.files import input_path
from megatron_octo.data.corpora.problems import problems
from megatron_octo.data.corpora.read import ShardReader
from megatron_octo.data.corpora.render import BadRecord, gold_number, gsm8k
from megatron_octo.data.corpora.shard import list_shards
from megatron_octo.data.engine.build import _build_problems
from megatron_octo.errors import ConfigError, DataError

GSM8K = [
    (
        {
            "question": "Ida bakes 12 buns in the morning and twice as many at noon. How many buns does she bake?",
            "answer": "At noon she bakes 12 * 2 = <<12*2=24>>24 buns.\n12 + 24 = <<12+24=36>>36 buns.\n#### 36",
        },
        "Question: Ida bakes 12 buns in the morning and twice as many at noon. How many buns does she bake?\nAnswer: "
        "At noon she bakes 12 * 2 = 24 buns.\n12 + 24 = 36 buns.\n\\boxed{36}",
    ),
    (
        {"question": " 50 sheep cost $24 each. What do all cost? ", "answer": "50*24=$<<50*24=1200>>1200\n#### 1,200"},
        "Question: 50 sheep cost $24 each. What do all cost?\nAnswer: 50*24=$1200\n\\boxed{1200}",
    ),
    (
        {"question": "It has 3 degrees, then 8 less. How warm is it?", "answer": "3-8=<<3-8=-5>>-5 degrees.\n####-5\n"},
        "Question: It has 3 degrees, then 8 less. How warm is it?\nAnswer: 3-8=-5 degrees.\n\\boxed{-5}",
    ),
]  # fmt: skip

ONE = {"c": {"path": "x"}}


def _config(**values: object) -> DataBuildConfig:
    return parse_config(DataBuildConfig, {"tokenizer": {"train": {"vocabulary_size": 300}}, **values}, "test")


def _reader(path: Path, on_bad_line: str = "strict", **values: object) -> ShardReader:
    """A reader of a corpus of one file."""
    config = _config(corpora={"c": {"path": str(path), **values}}, on_bad_line=on_bad_line)
    (shard,) = list_shards(config, "c")
    return ShardReader(config, shard)


@pytest.mark.parametrize(("record", "expected"), GSM8K)
def test_gsm8k_rendering(record: dict, expected: str) -> None:
    assert gsm8k(**record) == expected


def test_fields_are_named_in_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"body": " as it is\\n", "q": "1+1?", "a": "2 "}\n')
    assert [document.text for document in _reader(path, fields={"text": "body"})] == [" as it is\n"]
    pairs = _reader(path, adapter="qa", fields={"question": "q", "answer": "a"})
    assert [document.text for document in pairs] == ["Question: 1+1?\nAnswer: 2"]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("a\n#### 72", "72"), ("#### 1,234,567", "1234567"), ("-3.5", "-3.5"), ("#### $40", "40"), ("18", "18")],
)
def test_gold_number(answer: str, gold: str) -> None:
    assert gold_number(answer) == gold


@pytest.mark.parametrize("answer", ["no number", "#### seven", "1 2", "####", "1e400", "NaN"])
def test_no_gold_number(answer: str) -> None:
    with pytest.raises(BadRecord):
        gold_number(answer)


def test_gsm8k_without_gold_line_is_refused() -> None:
    with pytest.raises(BadRecord, match="#### number"):
        gsm8k("q", "it is 18")


def test_missing_file_says_what_to_get_and_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = InputFile(
        path="${OCTO_DATA:-data}/gsm8k/train.jsonl", hint="download train.jsonl of openai/grade-school-math"
    )
    monkeypatch.setenv("OCTO_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        input_path(file, "corpora.gsm8k")
    for part in (
        "corpora.gsm8k",
        f"{tmp_path}/gsm8k/train.jsonl does not exist",
        file.hint,
        "or set OCTO_DATA to where it is (${OCTO_DATA:-data}/gsm8k/train.jsonl)",
    ):
        assert part in str(caught.value)
    (tmp_path / "gsm8k" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(DataError, match="is a directory"):
        input_path(file, "corpora.gsm8k")


def test_variables_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTO_TEST", raising=False)
    assert expand_path("${OCTO_TEST:-a/b}/c", "f") == Path("a/b/c")
    with pytest.raises(ConfigError, match=r"f = '\$\{OCTO_TEST\}/c': environment variable OCTO_TEST is not set"):
        expand_path("${OCTO_TEST}/c", "f")
    monkeypatch.setenv("OCTO_TEST", "/x")
    assert expand_path("${OCTO_TEST}/${OCTO_TEST:-y}", "f") == Path("/x//x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no sources"),
        ({"corpora": {"c": {"path": "x", "split": "test"}}}, "a test split is for evaluation"),
        ({"world": {"tokens": {"web": 9}}, "corpora": {"web": {"path": "x"}}}, "already writes a source of this name"),
        ({"corpora": {"../c": {"path": "x"}}}, "a name is a file name"),
        ({"world": {"tokens": {"web": 0}}}, "leave the source out"),
        ({"world": {"tokens": {"web": 9}}, "problems": {"train": {}}}, "give a count"),
        ({"world": {"tokens": {"web": 9}}, "tokenizer": {}}, "exactly one of train and path"),
        ({"corpora": ONE, "problems": {"train": {"file": {"path": "x", "split": "test"}}}}, "would train"),
        ({"corpora": {"c": {"pth": "x"}}}, "did you mean 'path'"),
        ({"corpora": ONE, "tokenizer": {"train": {"vocabulary_size": 9, "corpora": ["b"]}}}, "names 'b'"),
    ],
)  # fmt: skip
def test_configuration_rules(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(**values)
    assert message in str(caught.value)


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n}+1?", "answer": f"#### {n + 1},000"}) + "\n" for n in range(50))
    )
    wanted = {"count": 7, "file": {"path": str(path), "split": "test"}}
    config = _config(world={"tokens": {"web": 9}}, problems={"heldout": wanted})
    drawn = problems(config, "heldout")
    assert len(drawn) == 7 and drawn == problems(config, "heldout")
    assert all(problem.answer == str((int(problem.question[:-3]) + 1) * 1000) for problem in drawn)
    assert len({problem.id for problem in drawn}) == 7
    with pytest.raises(DataError, match="51 problems asked for, its file has 50"):
        problems(_config(world={"tokens": {"web": 9}}, problems={"heldout": {**wanted, "count": 51}}), "heldout")


def test_equal_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "question": "1?", "answer": "1"}\n{"id": "a", "question": "2?", "answer": "2"}\n')
    config = _config(world={"tokens": {"web": 9}}, problems={"train": {"file": {"path": str(path)}}})
    with pytest.raises(DataError, match="line 2: its id was there before: 'a'"):
        problems(config, "train")


def test_heldout_question_is_left_out_of_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"question": "What is  2+2 ?", "answer": "4"}\n{"question": "What is 2+3?", "answer": "5"}\n')
    (tmp_path / "held.jsonl").write_text('{"question": "what IS 2+2?", "answer": "4"}\n')
    held = {"file": {"path": str(tmp_path / "held.jsonl"), "split": "test"}}
    config = _config(corpora={"c": {"path": str(path), "adapter": "qa"}}, problems={"heldout": held})
    reader = ShardReader(config, *list_shards(config, "c"))
    assert [document.text.splitlines()[0] for document in reader] == ["Question: What is 2+3?"]
    assert reader.accounts.removed == {"heldout": 1} and reader.accounts.read == 2


def test_a_skipped_heldout_problem_is_counted_and_its_question_still_held_out(tmp_path: Path) -> None:
    corpus, held = tmp_path / "c.jsonl", tmp_path / "held.jsonl"
    corpus.write_text('{"question": "What is  1/4+1/4 ?", "answer": "a half"}\n{"question": "2+3?", "answer": "5"}\n')
    held.write_text(
        '{"question": "What is 1/4+1/4?", "answer": "\\\\frac{1}{2}"}\n{"question": "7+7?", "answer": "14"}\nnot JSON\n'
    )
    config = _config(
        corpora={"c": {"path": str(corpus), "adapter": "qa"}},
        problems={"heldout": {"file": {"path": str(held), "split": "test"}}},
        on_bad_line="skip",
    )
    reader = ShardReader(config, *list_shards(config, "c"))
    assert [document.text for document in reader] == ["Question: 2+3?\nAnswer: 5"]
    assert reader.accounts.removed == {"heldout": 1}
    facts = _build_problems(config, tmp_path / "out")["heldout"]
    assert facts["count"] == 1 and sum(facts["skipped"].values()) == 2
    assert facts["skipped"]["its answer is not a number"] == 1 and facts["first_skipped"][0].startswith("1: its answer")


def test_real_gsm8k() -> None:
    folder = os.environ.get("OCTO_DATA")
    if not folder:
        pytest.skip("OCTO_DATA is not set: real GSM8K was NOT tested (folder with corpora/gsm8k_train and eval/gsm8k)")
    train = {"path": "${OCTO_DATA}/corpora/gsm8k_train/train.jsonl", "adapter": "gsm8k"}
    test = {"path": "${OCTO_DATA}/eval/gsm8k/test.jsonl", "split": "test"}
    config = _config(
        corpora={"gsm8k": train}, problems={"heldout": {"file": test}, "train": {"file": {"path": train["path"]}}}
    )
    reader = ShardReader(config, *list_shards(config, "gsm8k"))
    documents = [document.text for document in reader]
    assert len(documents) == reader.accounts.read == 7473
    assert not [text for text in documents if "<<" in text or "####" in text or not text.endswith("}")]
    assert len(problems(config, "heldout")) == 1319
    assert len(problems(config, "train")) == 7473

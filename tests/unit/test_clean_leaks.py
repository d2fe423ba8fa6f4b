"""Decontamination: what gives a question away, what only looks like it, and how well the two are told apart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from clean_tools import clean, config_of, questions, read_held, shards_of, write_benchmark

from megatron_octo.config.clean import Decontaminate
from megatron_octo.config.load import parse_config
from megatron_octo.data.clean.index import LeakIndex
from megatron_octo.data.clean.leaks import LEAKS, plant
from megatron_octo.data.clean.measure import absent_line, measure, table_lines
from megatron_octo.data.clean.questions import KNOWN, Question, all_questions, read_questions
from megatron_octo.data.clean.removals import read_removals
from megatron_octo.data.clean.stages import clean_facts, clean_stages
from megatron_octo.data.clean.words import words_of
from megatron_octo.data.corpora.read import ShardReader
from megatron_octo.data.corpora.shard import list_shards
from megatron_octo.data.engine.executors import InProcess
from megatron_octo.data.engine.inputs import look_at, versions
from megatron_octo.data.engine.stage import run_stages
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.evaluate.problems import BENCHMARKS
from megatron_octo.files import hash_file

LONG = (
    "Mira has 12 apples and finds 7 more of them on the way to the market. Every week she brings 3 boxes with 25 "
    "apples each to the harbour, but the last one is always empty. How many apples does Mira have now?"
)
PHRASE = "written in the form $m/n$, where $m$ and $n$ are relatively prime positive integers. What is $m+n$?"


def _config(**against: Any) -> Decontaminate:
    return parse_config(Decontaminate, {"against": against or {"b": {"path": "b"}}}, "test")


def _index(*texts: str, **settings: Any) -> LeakIndex:
    config = _config().model_copy(update=settings)
    return LeakIndex([Question(f"b/{number}", text) for number, text in enumerate(texts)], config)


def _words(first: str, count: int) -> list[str]:
    """Different words, all of letters: a digit would begin another word."""
    return [first + chr(97 + number // 26) + chr(97 + number % 26) for number in range(count)]


def _found(index: LeakIndex, text: str) -> str | None:
    match = index.leak(words_of(text))
    return match and index.questions[match.question].id


@pytest.mark.timeout(120)
def test_goal_on_generated_questions(tmp_path: Path) -> None:
    """Recall 1 on verbatim, re-wrapped and embedded leaks, precision 0.99: the figures of this very table."""
    facts = measure(_config(made=write_benchmark(tmp_path / "made.jsonl", questions(150))), seed=0)
    one = measure(_config(made=write_benchmark(tmp_path / "one.jsonl", questions(150))), seed=0, sample=1)
    tables = [table for each in (facts, one) for side in ("leaks", "near_misses") for table in each[side].values()]
    counts = [count for table in tables for counted in table.values() for count in counted.values()]
    assert {type(count) for count in counts} == {int}
    assert set(facts["recall"]) == {*LEAKS, "half"}
    for kind in ("verbatim", "rewrapped", "embedded", "markdown", "html", "latex", "half"):
        assert facts["recall"][kind] == 1.0, facts["wrong"].get(kind)
    assert facts["precision"] >= 0.99
    assert 0.4 < facts["recall"]["numbers"] <= 1 and 0.5 < facts["recall"]["reordered"] <= 1
    assert set(facts["false_positives"]) == {"template", "topic", "quote", "phrases", "definition"}
    assert facts["false_positives"]["definition"] == 0
    planted = facts["leaks"]["verbatim"]["made"]["planted"]
    assert planted == 150 and "verbatim      made" in "\n".join(table_lines(facts))
    assert json.loads(json.dumps(facts)) == facts


def test_planting_follows_from_its_seed() -> None:
    some = [Question(f"b/{number}", text) for number, text in enumerate(questions(8))]
    one, two, other = (list(plant(some, seed)) for seed in (0, 0, 1))
    assert one == two != other
    assert len({(planted.question.id, planted.kind) for planted in one}) == len(one)


def test_share_of_ngrams_decides() -> None:
    index = _index(LONG, quoted=None)
    words = LONG.split()
    assert _found(index, " ".join(words[:30])) == "b/0"
    assert _found(index, " ".join(words[10:30])) is None and index.touched(words_of(" ".join(words[10:30])))
    assert _found(_index(LONG, coverage=0.0), " ".join(words[10:30])) == "b/0"
    assert not _index(LONG).touched(words_of(" ".join(words[10:22]))), "12 words are no evidence at all"


def test_a_long_quotation_gives_a_question_away() -> None:
    """27 of 60 words in a row are 15 of 48 13-grams, less than a third."""
    asked = _words("w", 60)
    page = "Some prose before it. {} And some after it, of many words."
    whole, index = " ".join(asked), _index(" ".join(asked))
    assert _found(_index(whole, quoted=None), page.format(" ".join(asked[20:47]))) is None
    for first in (0, 20, 33):
        assert _found(index, page.format(" ".join(asked[first : first + 27]))) == "b/0"
        assert _found(index, page.format(" ".join(asked[first : first + 26]))) is None
    apart = page.format(" ".join([*asked[:20], "and", *asked[30:45]]))
    assert _found(index, apart) is None, "8 and 3 13-grams, 20 and 15 words in a row"
    long = _words("w", 300)
    assert _found(_index(" ".join(long)), page.format(" ".join(long[90:120]))) == "b/0", "30 words are no accident"
    assert _found(_index(" ".join(long)), page.format(" ".join(long[90:119]))) is None
    match = index.leak(words_of(page.format(" ".join(asked[20:47]))))
    assert match is not None and (match.first, match.words) == (4, 27)


def test_a_quotation_ends_where_a_common_phrase_begins() -> None:
    """What many questions share is quoted by texts that know none of them."""
    stem = " ".join(_words("s", 40))
    asked = [f"{' '.join(_words(own, 40))} {stem}" for own in "abc"]
    assert _found(_index(*asked), f"Here is {stem} and no more") is None
    assert _found(_index(*asked[:2]), f"Here is {stem} and no more") is not None
    assert _found(_index(*asked), " ".join(asked[1].split()[31:])) is None, "9 words of its own, and the stem"


def test_other_numbers_give_away_and_other_names_do_not() -> None:
    varied = LONG.replace("12", "40").replace("7 more", "eleven more").replace("25", "8").replace("3 boxes", "9 boxes")
    assert _found(_index(LONG), varied) == "b/0"
    assert _found(_index(LONG, changed_numbers=None), varied) is None
    named = varied.replace("Mira", "Ivo").replace("apples", "shells").replace("market", "pier").replace("week", "day")
    assert _found(_index(LONG), named) is None
    exercise = "What is the greatest common divisor of the two numbers {} and {} in base ten?"
    assert _found(_index(exercise.format(12, 18)), exercise.format(35, 49)) is None
    assert _found(_index(exercise.format(12, 18)), exercise.format(12, 18)) == "b/0"


def test_common_phrases_are_no_evidence() -> None:
    asked = [f"The {thing} of all {thing}s can be {PHRASE}" for thing in ("area", "length", "number")]
    assert _found(_index(*asked), f"Here the answer is {PHRASE}") is None
    assert _found(_index(*asked[:2]), f"Here the answer is {PHRASE}") is not None
    for number, text in enumerate(asked):
        assert _found(_index(*asked), text) == f"b/{number}"
    assert _found(_index(*[f"{PHRASE}{' again' * n}" for n in range(4)]), PHRASE) is not None, "all it has are phrases"


@pytest.mark.parametrize(
    ("question", "document", "leaks"),
    [
        ("What is the remainder of 2004 divided by 12?", "so what is the remainder of 2004 divided by 12 here", True),
        ("What is the remainder of 2004 divided by 12?", "what is the remainder of 2005 divided by 12?", False),
        ("Find $x$ if the sum $x + 5 + y = 9$ and $y = 1$.", "find x if the sum x + 5 + y = 9 and y = 1, then", True),
        ("Find $x$ if the sum $x + 5 + y = 9$ and $y = 1$.", "find x if the sum x + 5 - y = 9 and y = 1, then", False),
        (r"Simplify $\sqrt{242}$.", "Q: Simplify $\\sqrt{242}$. A: $11\\sqrt{2}$", True),
        (r"Simplify $\sqrt{242}$.", "3. Simplify \u221a242\n4. Simplify \u221a50", True),
        (r"Simplify $\sqrt{242}$.", "You see how. Simplify $\\sqrt{242}$. Then go on.", True),
        (r"Simplify $\sqrt{242}$.", "it is easy to simplify $\\sqrt{242}$ further", False),
        (r"Simplify $\sqrt{242}$.", "Simplify $\\sqrt{243}$.", False),
        (r"Simplify: $$\frac{3}{x}$$", "Here: Simplify: \\[\\dfrac{3}{x}\\] and so on", True),
    ],
)  # fmt: skip
def test_short_questions(question: str, document: str, leaks: bool) -> None:
    assert (_found(_index(question), document) is not None) == leaks


def test_removals_name_the_question(tmp_path: Path) -> None:
    asked = questions(40)
    entry = write_benchmark(tmp_path / "made.jsonl", asked)
    leak = f"Before it.\nQuestion: {asked[3]}\nAnswer: no."
    corpora = {"a": [["clean text", leak, "more"], ["clean text", leak.upper()]], "b": [[leak, "other"]]}
    found = clean(corpora, tmp_path / "work", decontaminate={"against": {"made": entry}, "measure": 5}, deduplicate={})
    assert {name: (r.reason, r.other) for name, r in found.items()} == {
        "a/0.jsonl:2": ("leak", "made/q3"),
        "a/1.jsonl:1": ("exact_duplicate", "a/0.jsonl:1"),
        "a/1.jsonl:2": ("leak", "made/q3"),
        "b/0.jsonl:1": ("leak", "made/q3"),
    }
    shown, size = found["a/0.jsonl:2"], len(words_of(asked[3]))
    assert words_of(shown.excerpt).hashes.tolist() == words_of(leak).hashes.tolist(), "with what stands around it"
    assert shown.agrees == f"{size} of {size} words in a row, 100% of its n-grams"
    records = [json.loads(path.read_text())["facts"] for path in (tmp_path / "work/records/removals").iterdir()]
    assert sum(facts["leaks"].get("made", 0) for facts in records) == 3
    recall = json.loads((tmp_path / "work/records/recall/00000.json").read_text())["facts"]
    assert recall["recall"]["verbatim"] == 1.0 and recall["leaks"]["verbatim"]["made"]["planted"] == 5


def test_a_benchmark_that_changes_is_compared_again(tmp_path: Path) -> None:
    asked = questions(4)
    entry = write_benchmark(tmp_path / "made.jsonl", asked[:2])
    settings = {"decontaminate": {"against": {"made": entry}, "measure": 0}}
    corpora = {"a": [[asked[0], asked[3]]]}
    assert list(clean(corpora, tmp_path / "work", **settings)) == ["a/0.jsonl:1"]
    write_benchmark(tmp_path / "made.jsonl", asked[2:])
    assert list(clean(corpora, tmp_path / "work", **settings)) == ["a/0.jsonl:2"]


def test_absent_benchmark(tmp_path: Path) -> None:
    missing = {"path": str(tmp_path / "missing.jsonl"), "like": "gsm8k"}
    with pytest.raises(DataError, match=r"against.x: .*missing.jsonl is not there; .*fix: .*absent: ok"):
        clean({"a": [["text"]]}, tmp_path / "work", decontaminate={"against": {"x": missing}})
    unset = {"path": "${OCTO_NO_SUCH_PLACE}/x.jsonl", "like": "gsm8k"}
    with pytest.raises(ConfigError, match="OCTO_NO_SUCH_PLACE is not set"):
        all_questions(_config(x=unset))
    config = _config(x={**missing, "absent": "ok"}, y={**unset, "absent": "ok"},
                     made=write_benchmark(tmp_path / "made.jsonl", questions(3)))  # fmt: skip
    assert all_questions(config)[1] == {"x": None, "y": None, "made": 3}
    assert table_lines(measure(config, 0))[-1] == "not compared, for their files are absent: x, y"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no question"),
        ('{"id": 1}\n', "no 'question'"),
        ('{"question": " ", "id": 1}\n', "empty question"),
        ("[1]", "entry 1: holds int"),
        ("[{", "not JSON"),
        ("no json\n", "line 1: not JSON"),
    ],
)
def test_damaged_benchmarks_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_questions("b", _config(b={"path": str(path), "like": "gsm8k"}).against["b"])


def test_known_benchmarks(tmp_path: Path) -> None:
    assert set(BENCHMARKS) < set(KNOWN) and len(KNOWN) == 14
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"Question": "Is it?", "Canary String": "x"}]))
    assert read_questions("gpqa", _config(gpqa={"path": str(path)}).against["gpqa"]) == [Question("gpqa/1", "Is it?")]
    path.write_text(json.dumps({"Body": "He has 3 pens.", "Question": "How many?", "idx": 7}))
    assert read_questions("svamp", _config(svamp={"path": str(path)}).against["svamp"]) == [
        Question("svamp/7", "He has 3 pens. How many?")
    ]
    with pytest.raises(ConfigError, match="no known benchmark is named 'mine'.*fix: name its columns"):
        read_questions("mine", _config(mine={"path": str(path)}).against["mine"])


REAL = "OCTO_DATA is not set: GSM8K train was NOT compared with the benchmarks (folder with corpora/ and eval/)"


@pytest.mark.timeout(120)
def test_real_gsm8k_train_against_four_benchmarks(tmp_path: Path) -> None:
    """No document of the train split holds a test question; two ask one with other numbers and one other noun."""
    folder = os.environ.get("OCTO_DATA")
    if not folder:
        pytest.skip(REAL)
    names = ("gsm8k", "math500", "amc23", "olympiad_bench")
    against = {name: {"path": f"{folder}/eval/{name}/test.jsonl"} for name in names}
    corpus = {"path": f"{folder}/corpora/gsm8k_train/train.jsonl", "adapter": "gsm8k"}
    config = config_of(corpora={"train": corpus}, deduplicate={"near": {}},
                       decontaminate={"against": against, "measure": 40})  # fmt: skip
    shards = list_shards(config, "train")
    facts = run_stages(clean_stages(config, {"train": shards}, tmp_path, {}), tmp_path, InProcess())
    found = [removal for shard in shards for removal in read_removals(tmp_path, shard)]
    assert [(removal.document, removal.reason, removal.other) for removal in found] == [
        (f"train/train.jsonl:{line}", "leak", "gsm8k/gsm8k-test-602") for line in (1315, 5163)
    ], "and none of them is there twice, or nearly"
    assert "how many additional hours would it take to travel an additional" in found[0].excerpt
    assert sum(seen["documents"] for seen in facts["signatures"]) == 7473
    index = LeakIndex(all_questions(_config(**against))[0], _config(**against))
    texts = (document.text for shard in shards for document in ShardReader(config, shard))
    shares = [match.coverage for text in texts for match in index.touched(words_of(text)) if match.kind == "same"]
    assert sorted(round(share, 2) for share in shares) == [0.1, 0.3, 0.54, 0.54], "no question is there whole"
    recall = facts["recall"][0]
    assert all(recall["recall"][kind] == 1.0 for kind in ("verbatim", "rewrapped", "embedded", "markdown", "latex"))
    assert recall["recall"]["half"] >= 0.95 and recall["false_positives"]["definition"] == 0
    assert recall["precision"] >= 0.99


def test_an_absent_benchmark_stands_in_the_facts(tmp_path: Path) -> None:
    """Also where nothing is measured: no leaks found and nothing looked for are two things."""
    against = {"made": write_benchmark(tmp_path / "made.jsonl", questions(3)),
               "gone": {"path": str(tmp_path / "gone.jsonl"), "like": "gsm8k", "absent": "ok"}}  # fmt: skip
    config, shards = config_of(decontaminate={"against": against, "measure": 0}), shards_of({"a": [["text"]]})
    facts = run_stages(clean_stages(config, shards, tmp_path, {}, read_held), tmp_path, InProcess())
    found = clean_facts(config, facts, shards)
    assert found is not None and found["benchmarks"] == {"made": 3, "gone": None}
    assert absent_line(found) == ["not compared, for their files are absent: gone"]


def test_tasks_compare_with_the_files_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without the variable finds the file, and one whose file is another, or missing, or there, says so."""
    path = tmp_path / "made.jsonl"
    entry = {**write_benchmark(path, questions(3)), "path": "${MADE_FOR_TEST}/made.jsonl", "absent": "ok"}
    gone = {"path": "${MADE_FOR_TEST}/gone.jsonl", "like": "gsm8k", "absent": "ok"}
    monkeypatch.setenv("MADE_FOR_TEST", str(tmp_path))
    config = config_of(decontaminate={"against": {"made": entry, "gone": gone}, "measure": 0})
    shards = shards_of({"a": [[questions(3)[0]]]})
    known = versions([look_at(str(path))], {str(path): hash_file(path)})
    stages = clean_stages(config, shards, tmp_path, known, read_held)
    monkeypatch.delenv("MADE_FOR_TEST")
    (tmp_path / "gone.jsonl").write_text("not looked at")
    facts = run_stages(stages, tmp_path, InProcess())
    assert facts["signatures"][0]["leaks"] == 1 and facts["signatures"][0]["benchmarks"] == {"made": 3, "gone": None}
    write_benchmark(path, questions(4, seed=8))
    with pytest.raises(DataError, match="is another file here"):
        run_stages(stages, tmp_path / "other", InProcess())
    path.unlink()
    with pytest.raises(DataError, match="is not there"):
        run_stages(stages, tmp_path / "third", InProcess())

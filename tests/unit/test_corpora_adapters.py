"""Each adapter on small files of exactly the schema in which its corpus is published, all columns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from corpora_tools import config_of, read, shards_of, write_rows

from megatron_octo.data.corpora import render
from megatron_octo.data.corpora.registry import ADAPTERS, describe
from megatron_octo.data.corpora.render import BadRecord, Unsuitable
from megatron_octo.errors import ConfigError, DataError

TEXT, WHOLE, NUMBER, YES = pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.bool_()


def many(kind: pyarrow.DataType) -> pyarrow.DataType:
    return pyarrow.list_(kind)


def schema(texts: str = "", **others: pyarrow.DataType) -> pyarrow.Schema:
    return pyarrow.schema([*((name, TEXT) for name in texts.split()), *others.items()])


TURNS = many(pyarrow.struct([("content", TEXT), ("role", TEXT)]))
PAGE = schema(
    "url warc_filename content_mime_type content_charset snapshot_type language text",
    fetch_time=WHOLE, warc_record_offset=WHOLE, warc_record_length=WHOLE, token_count=WHOLE, char_count=WHOLE,
    score=NUMBER, int_score=WHOLE, crawl=TEXT, language_score=NUMBER,
)  # fmt: skip
MEGA_WEB = schema("text cc-path domain lang url timestamp", lang_score=NUMBER, math_score=NUMBER, finemath_score=NUMBER)
PROBLEM = "problem solution answer problem_type question_type source uuid"
OPENR1 = schema(
    PROBLEM, is_reasoning_complete=many(YES), generations=many(TEXT), correctness_math_verify=many(YES),
    correctness_llama=many(YES), finish_reasons=many(TEXT), correctness_count=WHOLE, messages=TURNS,
)  # fmt: skip
NUMINA = schema(
    "problem solution answer problem_type question_type problem_is_valid solution_is_valid source", synthetic=YES
)
TIR = schema(
    "expected_answer problem_type problem_source generation_model pass_rate_72b_tir problem generated_solution "
    "inference_mode"
)
WILD_TURN = pyarrow.struct(
    [("content", TEXT), ("country", TEXT), ("language", TEXT), ("redacted", YES), ("role", TEXT), ("toxic", YES)]
)
WILD = schema("conversation_hash model language", conversation=many(WILD_TURN), turn=WHOLE, toxic=YES, redacted=YES)

GOOD = "<think>\nLet me add. 2+2 is 4.\n**Final Answer**\n\\boxed{4}\n</think>\n\nThe sum is $\\boxed{4}$."
PLAIN = "<think>It is 4, clearly.</think>So the answer is:\n\\[\n\\boxed{4}\n\\]\nDone."
OPEN = "<think>Let me think, and think, and"


def turns(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"content": text, "role": roles[number % 2]} for number, text in enumerate(texts)]


def openr1(generations: list[str], right: list[bool], complete: list[bool], llama: Any = None) -> dict[str, Any]:
    return {
        "problem": "What is 2+2?", "solution": "4.", "answer": "4", "uuid": "u", "generations": generations,
        "correctness_math_verify": right, "correctness_llama": llama, "is_reasoning_complete": complete,
        "finish_reasons": ["stop"] * len(generations), "correctness_count": sum(right), "messages": turns("q", "a"),
    }  # fmt: skip


THINKS = "What is 2+2?\nLet me add. 2+2 is 4.\n**Final Answer**\n\\boxed{4}"
CASES: dict[str, tuple[str, pyarrow.Schema | None, list[tuple[dict[str, Any], str]]]] = {
    **{
        name: ("c.parquet", MEGA_WEB if name == "megamath-web" else schema("text"), [({"text": " 1=1\n"}, " 1=1\n")])
        for name in ADAPTERS
        if name.startswith("megamath-") and name != "megamath-code"
    },
    **{
        name: ("c.parquet", PAGE, [({"text": "A page.", "score": 3.2, "url": "u"}, "A page.")])
        for name in ("finemath-3plus", "finemath-4plus", "infiwebmath-3plus", "infiwebmath-4plus")
    },
    "openwebmath": ("c.parquet", schema("url text date metadata"), [({"text": "$x$", "metadata": "{}"}, "$x$")]),
    "dclm-baseline": ("c.jsonl.zst", None, [
        ({"bff_contained_ngram_count_before_dedupe": 0, "language_id_whole_page_fasttext": {"en": 0.9},
          "metadata": {"WARC-Type": "response"}, "previous_word_count": 9, "text": "A page.", "url": "u",
          "warcinfo": "w", "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.2}, "A page."),
    ]),
    "mathpile": ("c.jsonl.gz", None, [({"text": "Lemma.", "SubSet": "arXiv", "meta": {"id": "1"}}, "Lemma.")]),
    "mathpile-commercial": ("c.jsonl.gz", None, [({"text": "Lemma.", "SubSet": "arXiv", "meta": {}}, "Lemma.")]),
    "infimm-webmath": ("c.parquet", schema("URL metadata", text_list=many(TEXT), image_list=many(TEXT)), [
        ({"text_list": ["before", None, "after"], "image_list": [None, "http://i", None]}, "before\nafter"),
        ({"text_list": [None], "image_list": ["http://i"]}, "! no text between its images"),
    ]),
    "openr1-math-220k": ("c.parquet", OPENR1, [
        (openr1([OPEN, GOOD, PLAIN], [True, True, True], [False, True, True]), THINKS),
        (openr1([PLAIN, GOOD], [False, True], [True, True]), THINKS),
        (openr1([PLAIN, GOOD], [False, False], [True, True], [True, False]),
         "What is 2+2?\nIt is 4, clearly.\n\\boxed{4}"),
        (openr1([GOOD], [False], [True]), "! no generation that is verified and complete"),
        (openr1([OPEN], [True], [False], [True]), "! no generation that is verified and complete"),
        (openr1([OPEN], [True], [True]), "! thinking not complete"),
        (openr1([GOOD], [True, True], [True]), "? generations and their verdicts are not lists of one length"),
    ]),
    "am-deepseek-distilled-40m": ("c.jsonl", None, [
        ({"question": "What is 2+2?", "answer": GOOD, "verify_score": 1.0, "ground_truth_answer": "4",
          "ppl": 1.9, "pass_rate_r1": 1.0, "model_name": "deepseek-r1"}, THINKS),
        ({"question": "What is 2+2?", "answer": PLAIN, "verify_score": None},
         "What is 2+2?\nIt is 4, clearly.\n\\boxed{4}"),
        ({"question": "What is 2+2?", "answer": "<think>It is 4.</think>Four.", "ground_truth_answer": "4"},
         "What is 2+2?\nIt is 4.\n\\boxed{4}"),
        ({"question": "What is 2+2?", "answer": "<think>It is 4.</think>Four."}, "! no boxed answer"),
        *(({"question": "What is 2+2?", "answer": GOOD, "verify_score": score}, what) for score, what in (
            (0.0, "! not verified"), (0.5, "! not verified"), (-1, "! not verified"), ("0.0", "! not verified"),
            ("1.0", THINKS), (2, THINKS), ("yes", "? its verify_score is no number: 'yes'"),
            ("nan", "? its verify_score is no number: 'nan'"), ([1], "? its verify_score is no number: '[1]'"))),
        ({"question": "q", "answer": "<think>Add.</think>\n\n<answer>It is \\boxed{9}</answer>", "verify_score": 1},
         "q\nAdd.\nIt is \\boxed{9}"),
        ({"question": "q", "answer": "<think>Is it \\boxed{8} no</think><answer>By symmetry 9.</answer>",
          "ground_truth_answer": "9"}, "q\nIs it \\boxed{8} no\n\\boxed{9}"),
        ({"question": "q", "answer": "<think>Is it \\boxed{8} no</think><answer>9.</answer>"}, "! no boxed answer"),
        ({"question": "What is 2+2?", "answer": OPEN}, "! thinking not complete"),
        ({"question": "What is 2+2?"}, "? no field 'answer'"),
    ]),
    "openmathreasoning-tir": ("c.parquet", TIR, [
        ({"problem": "Sum to 9?", "expected_answer": "45", "inference_mode": "tir", "generated_solution":
          "<think>Use code.\n<tool_call>\nprint(sum(range(10)))\n</tool_call>\n```output\n45\n```\n</think>"
          "The sum is \\boxed{45}."},
         "Sum to 9?\nUse code.\n<tool_call>\nprint(sum(range(10)))\n</tool_call>\n```output\n45\n```\n"
         "The sum is \\boxed{45}."),
    ]),
    "openmathinstruct-2": ("c.parquet", schema("problem generated_solution expected_answer problem_source"), [
        ({"problem": " 1+1? ", "generated_solution": "It is \\boxed{2}.\n", "expected_answer": "2"},
         "1+1?\nIt is \\boxed{2}."),
        ({"problem": "1+1?", "generated_solution": None}, "? field 'generated_solution' is null and not text"),
    ]),
    "numinamath-1.5": ("c.parquet", NUMINA, [
        ({"problem": "1+1?", "solution": "2", "problem_is_valid": "Yes", "solution_is_valid": "Yes"}, "1+1?\n2"),
        ({"problem": "1+1?", "solution": "2", "problem_is_valid": "No", "solution_is_valid": "Yes"},
         "! problem not valid"),
        ({"problem": "1+1?", "solution": "2", "problem_is_valid": "Yes", "solution_is_valid": "Incomplete"},
         "! solution not valid"),
        ({"problem": "1+1?", "solution": "2", "problem_is_valid": "Yes", "solution_is_valid": None},
         "! solution not valid"),
        ({"problem": "1+1?", "solution": None, "problem_is_valid": "Yes", "solution_is_valid": "Yes"}, "! no solution"),
    ]),
    "openmathinstruct-1": ("c.jsonl", None, [
        ({"question": "1+1?", "generated_solution": "<llm-code>\n1+1\n</llm-code>\n<llm-code-output>\n2\n"
          "</llm-code-output>\nSo \\boxed{2}", "expected_answer": "2", "predicted_answer": "2", "error_message": "",
          "is_correct": True, "generation_type": "masked_reference_solution", "dataset": "gsm8k"},
         "1+1?\n<llm-code>\n1+1\n</llm-code>\n<llm-code-output>\n2\n</llm-code-output>\nSo \\boxed{2}"),
        ({"question": "1+1?", "generated_solution": "3", "is_correct": False}, "! wrong answer"),
        ({"question": "1+1?", "generated_solution": "3"}, "? no field 'is_correct'"),
    ]),
    "tulu-3-personas-if": ("c.parquet", schema("id prompt", messages=TURNS, constraints=many(TEXT)), [
        ({"id": "1", "prompt": "Hi", "messages": turns("Hi", "Hello\nyou"), "constraints": []},
         "User:Hi\nAssistant:Hello\nyou"),
    ]),
    "ultrachat-200k": ("c.parquet", schema("prompt prompt_id", messages=TURNS), [
        ({"prompt": "a", "messages": turns("a", "b", "c", "d")}, "User:a\nAssistant:b\nUser:c\nAssistant:d"),
        ({"messages": turns("a", "b", "c")}, "! turns are not user, assistant, user, assistant ..."),
        ({"messages": turns("a", " ")}, "! a turn is empty"),
        ({"messages": []}, "! turns are not user, assistant, user, assistant ..."),
        ({"messages": [{"role": "system", "content": "s"}, *turns("a", "b")]},
         "! turns are not user, assistant, user, assistant ..."),
        ({"messages": None}, "? field 'messages' is null"),
    ]),
    "wildchat": ("c.parquet", WILD, [
        ({"model": "gpt-4-0314", "conversation": turns("a", "b"), "turn": 1}, "User:a\nAssistant:b"),
        ({"model": "gpt-3.5-turbo", "conversation": turns("a", "b"), "turn": 1}, "! not answered by GPT-4"),
    ]),
    "text": ("c.jsonl", None, [({"text": "x", "id": 1}, "x")]),
    "qa": ("c.jsonl", None, [({"question": "1+1? ", "answer": " 2"}, "Question: 1+1?\nAnswer: 2")]),
    "gsm8k": ("c.jsonl", None, [
        ({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, "Question: 1+1?\nAnswer: 1+1=2\n\\boxed{2}"),
        ({"question": "1+1?", "answer": "2"}, "? its answer has no last line '#### number'"),
    ]),
    "messages": ("c.jsonl", None, [
        ({"messages": turns("a", "b")}, "User:a\nAssistant:b"),
        ({"messages": [{"role": "user"}]}, "? a turn has no role or no content"),
        ({"messages": ["a"]}, "? a turn has no role or no content"),
        ({"messages": 3}, "? a turn has no role or no content"),
        ({"messages": turns("a", "b\0")}, "? the document holds a NUL character"),
    ]),
}  # fmt: skip


def test_every_adapter_has_its_case() -> None:
    assert set(CASES) | {"megamath-code"} == set(ADAPTERS)


@pytest.mark.parametrize("name", CASES)
def test_adapter_on_its_schema(tmp_path: Path, name: str) -> None:
    """Texts as they stand; `!` a rule that leaves the record out under both policies, `?` damage."""
    file, columns, cases = CASES[name]
    adapter = ADAPTERS[name]
    assert file.endswith(adapter.form or "jsonl")
    rows, expected = [row for row, _ in cases], [text for _, text in cases]
    path = write_rows(tmp_path / file, rows, columns)
    documents, accounts = read(path, "skip", adapter=name)
    assert [text for _, text in documents] == [text for text in expected if text[0] not in "!?"]
    assert [int(found.rpartition(":")[2]) for found, _ in documents] == [
        number for number, text in enumerate(expected, start=1) if text[0] not in "!?"
    ]
    rules = {text[2:] for text in expected if text[0] == "!"}
    damage = [text[2:] for text in expected if text[0] == "?"]
    assert set(accounts.skipped) >= rules and sum(accounts.skipped.values()) == len(rows) - len(documents)
    assert [line.partition(": ")[2].partition(" (it has")[0] for line in accounts.first] == damage
    sound = [(row, text) for row, text in cases if text[0] != "?"]
    path = write_rows(tmp_path / "sound" / file, [row for row, _ in sound], columns)
    documents, accounts = read(path, "strict", adapter=name)
    assert accounts.read == len(sound) and accounts.first == [] and set(accounts.skipped) == rules
    for row, text in cases:
        if text[0] == "?":
            path = write_rows(tmp_path / "damaged" / file, [row], columns)
            with pytest.raises(DataError, match="(line|row) 1: "):
                read(path, adapter=name)


def test_parquet_corpora_are_refused_without_their_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "c.parquet", [{"nothing": 1}])
    for name, (file, _, _) in CASES.items():
        if file == "c.parquet":
            with pytest.raises(DataError, match=rf"has no column '{ADAPTERS[name].fields[0].name}'"):
                read(path, "skip", adapter=name)


def test_megamath_code_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="no text.*fix: .*Software Heritage.*megamath-translated-code"):
        shards_of("x.parquet", adapter="megamath-code")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adapter": "openwebmth"}, "no such adapter.*did you mean 'openwebmath'"),
        ({"adapter": "qqq"}, "no such adapter.*adapters are text, qa"),
        ({"adapter": "qa", "fields": {"text": "body"}}, "unknown field 'text'; adapter qa reads question, answer"),
    ],
)
def test_adapters_and_fields_that_are_not_there(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shards_of("x.jsonl", **values)


def test_a_shape_needs_a_path() -> None:
    from megatron_octo.data.corpora.shard import list_shards

    with pytest.raises(DataError, match="corpora.c names no path; adapter qa is a shape and no corpus"):
        list_shards(config_of({"c": {"adapter": "qa"}}), "c")


def test_a_hub_that_cannot_be_reached_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_octo.data.corpora.shard import list_shards

    def unreachable(*items: object, **named: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    with pytest.raises(DataError) as caught:
        list_shards(config_of({"c": {"adapter": "megamath-web-pro-max"}}), "c")
    assert "ConnectionError: no route to host" in str(caught.value) and "HF_TOKEN" in caught.value.rule
    assert "set corpora.c.path to a copy: hf download --repo-type dataset OctoThinker/MegaMath" in caught.value.fix


def test_a_hub_that_is_reached_gives_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the hub's files are asked for, and what they are called; the hub itself is not there."""
    from megatron_octo.data.corpora.shard import list_shards

    asked = []

    def listed(self: object, path: str, **named: object) -> list[str]:
        asked.append(path)
        return [f"{pinned}/finemath-4plus/train-0000{number}.parquet" for number in (1, 0)]

    pinned = f"datasets/HuggingFaceTB/finemath@{'c' * 40}"
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *items, **named: SimpleNamespace(sha="c" * 40))
    monkeypatch.setattr("huggingface_hub.HfFileSystem.glob", listed)
    monkeypatch.setattr("huggingface_hub.HfFileSystem.isfile", lambda *items: True)
    shards = list_shards(config_of({"c": {"adapter": "finemath-4plus"}}), "c")
    assert asked == [f"{pinned}/finemath-4plus/*.parquet"]
    assert [(shard.name, shard.path) for shard in shards] == [
        (
            f"train-0000{number}.parquet",
            f"hf://{pinned}/finemath-4plus/train-0000{number}.parquet",
        )
        for number in (0, 1)
    ]


# -- renderers by themselves


@pytest.mark.parametrize(
    ("thinking", "after", "answer", "end"),
    [
        ("so \\boxed{4}", "", None, "so \\boxed{4}"),
        ("so\n\\[ \\boxed{\\frac{1}{2}} \\]", "", None, "\\boxed{\\frac{1}{2}} \\]"),
        ("so\n\\[\n\\boxed{4}\n\\]\n", "", None, "so\n\\[\n\\boxed{4}\n\\]"),
        ("**Answer:** $\\boxed{4}$.", "", None, "$\\boxed{4}$."),
        ("first \\boxed{3}\nno, it is 4", "\\boxed{3} or\n \\boxed{4}\nas said", None, "it is 4\n\\boxed{4}"),
        ("it is 4", "as said", " 4 ", "it is 4\n\\boxed{4}"),
        ("\\boxed{3} or \\boxed{4}, no", "", "5", "no\n\\boxed{5}"),
        ("so \\boxed{3}", "no: \\boxed{4}.", None, "so \\boxed{3}\nno: \\boxed{4}."),
        ("so $\\boxed{{4}}$", "it is \\boxed{{4}}.", "4", "so $\\boxed{{4}}$"),
        ("so \\boxed{\\{1\\}\\left\\{}", "", "4", "so \\boxed{\\{1\\}\\left\\{}"),
        ("so \\boxed{4", "", "4", "so \\boxed{4\n\\boxed{4}"),
    ],
)
def test_thinking_ends_with_a_boxed_answer(thinking: str, after: str, answer: Any, end: str) -> None:
    text = render.thoughts(" q ", f"<think>\n{thinking}\n</think>{after}", answer)
    assert text.startswith("q\n") and text.endswith(end) and "think>" not in text


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("it is 4", "thinking not complete"),
        ("<think> </think>\\boxed{4}", "no thinking"),
        ("<think>it is 4</think>so 4", "no boxed answer"),
    ],
)
def test_responses_that_are_left_out(response: str, said: str) -> None:
    with pytest.raises(Unsuitable, match=said):
        render.thoughts("q", response, None)


def test_thinking_whose_first_tag_is_part_of_the_prompt() -> None:
    assert render.thoughts("q", "it is \\boxed{4}</think>", None) == "q\nit is \\boxed{4}"


def test_pieces_of_a_page_must_be_texts() -> None:
    with pytest.raises(BadRecord, match="not text"):
        render.joined(["a", 3])  # type: ignore[list-item]


@pytest.mark.parametrize("value", ["hello", 3, True, {"a": "b"}])
def test_a_field_that_must_be_a_list_is_one(value: Any) -> None:
    verdicts = ([True], None, [True], "4")
    for make in (render.joined, lambda texts: render.first_verified("q", texts, *verdicts)):
        with pytest.raises(BadRecord, match="list"):
            make(value)
    with pytest.raises(BadRecord, match="a turn has no role"):
        render.conversation(value)
    with pytest.raises(BadRecord, match="a generation is no text"):
        render.first_verified("q", [None], *verdicts)  # type: ignore[list-item]


# -- the registry


def test_the_registry_says_what_a_corpus_is() -> None:
    for adapter in ADAPTERS.values():
        facts = describe(adapter)
        assert json.loads(json.dumps(facts)) == facts and facts["renderer"].endswith(".")
        assert adapter.title and adapter.fields
        if adapter.name == "am-deepseek-distilled-40m":
            assert facts["renderer"].endswith("a response whose verify_score is 1 or more, or missing.")
        if adapter.hub:
            assert adapter.licence and adapter.files and adapter.form in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst")
            assert adapter.tokens or adapter.documents
    assert {name for name, adapter in ADAPTERS.items() if adapter.gated} == {
        "mathpile", "mathpile-commercial", "megamath-web-pro-max",
    }  # fmt: skip
    assert (
        describe(ADAPTERS["mathpile"])["tokens"] == "9.5B ?" and describe(ADAPTERS["openwebmath"])["tokens"] == "14.7B"
    )

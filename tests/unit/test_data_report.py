"""The page of a data directory: what it shows is what the directory holds, and nothing on it runs."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clean_tools import config_of, questions, write_benchmark
from page_tools import Page
from typer.testing import CliRunner

from megatron_octo.cli.root import app
from megatron_octo.data.engine.build import build_data
from megatron_octo.data.mix.ledger import find_document
from megatron_octo.data.report.cleaning import accounts_section, mark_common, removed_section
from megatron_octo.data.report.facts import build_facts
from megatron_octo.data.report.figures import source_colours
from megatron_octo.data.report.lengths import length_histogram
from megatron_octo.data.report.page import doubt
from megatron_octo.data.report.report import write_report
from megatron_octo.errors import DataError, EnvironmentProblem
from megatron_octo.page.markup import FORMATS, Facts, look, shown

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" ${title} </pre></main>'


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of generated text and two corpora with duplicates, leaks, damaged lines and an attack on the page."""
    folder = tmp_path_factory.mktemp("report")
    asked = [f"{HOSTILE} {questions(12, seed=3)[0]}", *questions(12, seed=3)[1:]]
    long = " ".join(f"word{number}" for number in range(80))
    first = [HOSTILE, long, f"so: {asked[1]} and so on", "another text"]
    _write(folder / "web.jsonl", [*first, HOSTILE.upper(), f"{long} more", f"once more {asked[0]}"])
    (folder / "qa.jsonl").write_text('{"text": "the only one"}\n{"text"\n{"text": ""}\n{"text": "another\\ntext"}\n')
    config = config_of(
        world={"tokens": {"short_cot": 300}},
        corpora={"web": {"path": str(folder / "web.jsonl")}, "qa": {"path": str(folder / "qa.jsonl")}},
        on_bad_line="skip",
        deduplicate={"near": {}, "partitions": 1},
        decontaminate={
            "against": {
                "made": write_benchmark(folder / "made.jsonl", asked),
                "gone": {"path": str(folder / "gone.jsonl"), "question": ["question"], "absent": "ok"},
            },
            "measure": 4,
        },
    )
    build_data(config, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def written(built: Path) -> tuple[dict[str, Any], str]:
    path, facts = write_report(built)
    return facts, path.read_text(encoding="utf-8")


def test_facts_are_those_of_the_directory(built: Path, written: tuple[dict[str, Any], str]) -> None:
    facts, manifest = written[0], json.loads((built / "manifest.json").read_text())
    assert facts["tokens"] == sum(source["tokens"] for source in manifest["sources"].values())
    for name, source in facts["sources"].items():
        bins = source["lengths"]["bins"]
        assert sum(one["documents"] for one in bins) == source["documents"] == manifest["sources"][name]["documents"]
        assert sum(one["tokens"] for one in bins) == source["tokens"]
        account = source["accounts"]
        left = sum(account["skipped"].values()) + sum(account["removed"].values())
        assert account["adds_up"] and account["left_out"] == left
        assert account["read"] == source["documents"] + account["beyond_budget"] + left
    assert facts["sources"]["short_cot"]["accounts"]["beyond_budget"] > 0
    assert facts["sources"]["web"]["accounts"]["removed"] == {"exact_duplicate": 1, "leak": 2, "near_duplicate": 1}
    assert sum(facts["sources"]["qa"]["accounts"]["skipped"].values()) == 2
    assert facts["frequent"][0]["count"] >= facts["frequent"][-1]["count"] > 0


def test_removals_stand_beside_what_they_equal(written: tuple[dict[str, Any], str]) -> None:
    examples = written[0]["cleaning"]["examples"]
    same = examples["exact_duplicate"][0]
    assert same["excerpt"] == HOSTILE.upper() and same["equals"] == HOSTILE
    near = examples["near_duplicate"][0]
    assert len(near["equals"]) > 500 and near["excerpt"] == f"{near['equals']} more", "all of both, to judge by"
    assert all(" in a row, " in leak["agrees"] for leak in examples["leak"])
    assert {leak["equals"].removeprefix(HOSTILE).strip() for leak in examples["leak"]} <= set(questions(12, seed=3))
    assert all(one["absent"] is None for several in examples.values() for one in several)


def test_every_figure_on_the_page_is_in_the_facts(written: tuple[dict[str, Any], str]) -> None:
    facts, page = written
    stated = Page(page).stated
    assert len(stated) > 40
    for path, kind, text in stated:
        assert text == FORMATS[kind](look(facts, path)), path


def test_texts_of_corpora_are_inert(written: tuple[dict[str, Any], str]) -> None:
    page = written[1]
    parsed = Page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert "script" not in tags and "img" not in tags and tags.count("main") == 1
    assert not any(name.startswith("on") for _, values in parsed.tags for name in values)
    visible = unescape(re.sub(r"</?mark>", "", page))
    for text in (HOSTILE, HOSTILE.upper()):
        assert text in visible, "the text itself is shown in full"
    assert shown("\x00\ud800\u202ea") == "\ufffd\ufffd\ufffda"


def test_page_needs_nothing_from_outside(written: tuple[dict[str, Any], str]) -> None:
    page = written[1]
    tags = Page(page).tags
    assert "http" not in page and "@import" not in page
    assert not {"link", "iframe", "object", "base", "script"} & {tag for tag, _ in tags}
    found = [str(values[name]) for _, values in tags for name in ("src", "href", "xlink:href") if name in values]
    found += re.findall(r"url\(([^)]*)\)", page)
    ids = [values["id"] for _, values in tags if "id" in values]
    assert found and all(one.startswith("#") for one in found) and {one[1:] for one in found} <= set(ids)
    assert len(ids) == len(set(ids)), "pictures of one page must not share ids"
    assert page.count("<svg") == 8  # sources, lengths, left out: wide and narrow each; ranks, recall


def test_honest_rows(written: tuple[dict[str, Any], str]) -> None:
    facts, page = written
    recall = facts["cleaning"]["recall"]
    section = page.split('id="recall"')[1].split("<section")[0]
    for kind, benchmarks in {**recall["leaks"], **recall["near_misses"]}.items():
        assert f"<b>{kind}</b>" in section
        assert f"{benchmarks['made']['found']:,} of {benchmarks['made']['planted']:,}" in section
    assert "Not compared, for their files are absent: gone." in section
    assert "file absent" in page.split('id="removed"')[1].split("<section")[0]


def test_what_was_not_asked_is_said_and_not_drawn_as_zero(tmp_path: Path) -> None:
    config = config_of(corpora={}, world={"tokens": {"web": 200, "short_cot": 200}})
    build_data(config, tmp_path / "out")
    page = write_report(tmp_path / "out", tmp_path / "page.html")[0].read_text()
    assert not (tmp_path / "out" / "report.html").exists()
    for said in (
        "asks for neither deduplication nor decontamination", "asks for no decontamination", "not measured",
        "not looked for", "No mixture is stated",
    ):  # fmt: skip
        assert said in page
    accounts = page.split('id="accounts"')[1].split("<section")[0]
    assert "<td>0</td>" in accounts, "nothing was skipped, and that is known"
    assert accounts.count("not sought") == 2 * 3 and "<svg" not in accounts


def test_a_document_that_stays_says_how_much_would_have_been_a_leak(written: tuple[dict[str, Any], str]) -> None:
    facts = written[0]
    one = {**facts["cleaning"]["examples"]["leak"][0], "agrees": "9 of 30 words in a row, 48% of its n-grams"}
    for reason, said in (
        ("numbers", "where numbers differ, 90% make a leak (changed_numbers)"),
        ("same", "33% make a leak (coverage), and so do 30 words in a row (quoted_words) or 45% of"),
    ):
        cleaning = {**facts["cleaning"], "touched": 1, "touched_examples": [{**one, "reason": reason}]}
        shown_now = removed_section(Facts({**facts, "cleaning": cleaning}), source_colours(facts))
        assert f"kept, 9 of 30 words in a row, 48% of its n-grams; {said}" in shown_now


def test_a_document_that_was_left_out_is_known_to_be(built: Path) -> None:
    sources = {"mine": built / "web", "qa": built / "qa"}
    for name, said in (
        ("web/web.jsonl:6", "left it out: near duplicate of web/web.jsonl:2"),
        ("web/web.jsonl:5", "left it out: exact duplicate of web/web.jsonl:1"),
        ("web/web.jsonl:3", "left it out: leak of made/"),
        ("qa/qa.jsonl:2", "left it out: not JSON"),
        ("web/web.jsonl:99", "left out 1 exact duplicate, 2 leak, 1 near duplicate, without a list of them all; fix: "),
        ("web/web.jsonl:99", f"look at examples: octo data report {built}"),
        ("other/x.jsonl:1", "no source holds a document 'other/x.jsonl:1'; the tables of mine, qa were"),
    ):
        with pytest.raises(DataError) as caught:
            find_document(name, sources)
        assert said in str(caught.value), str(caught.value)
    assert find_document("web/web.jsonl:2", sources) == [("mine", 1)]


def test_accounts_that_do_not_add_up_are_shown(written: tuple[dict[str, Any], str]) -> None:
    facts = json.loads(json.dumps(written[0]))
    assert "DOES NOT ADD UP" not in written[1] and 'class="banner"' not in written[1]
    facts["sources"]["web"]["accounts"]["adds_up"] = False
    assert "The accounts of web do not add up." in doubt(facts)
    assert accounts_section(Facts(facts), source_colours(facts)).count("DOES NOT ADD UP") == 1


def test_benchmark_that_changed_is_not_shown_as_the_one_compared(built: Path) -> None:
    path = built.parent / "made.jsonl"
    whole = path.read_text()
    try:
        path.write_text(whole + "\n")
        changed = build_facts(built)["cleaning"]["examples"]["leak"][0]
        path.unlink()
        gone = build_facts(built)["cleaning"]["examples"]["leak"][0]
    finally:
        path.write_text(whole)
    assert changed["equals"] is None and "has changed since the build" in changed["absent"]
    assert gone["equals"] is None and "is not here" in gone["absent"]


def test_directory_that_is_not_a_whole_build(built: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist or is damaged"):
        write_report(tmp_path)
    (tmp_path / "manifest.json").write_text('{"accounts": {}, "settings": {}}')
    with pytest.raises(DataError, match="not the manifest of a build"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"], "nothing is written where it fails"
    manifest = json.loads((built / "manifest.json").read_text())
    manifest["sources"]["web"]["documents"] += 1
    for path in built.iterdir():
        (tmp_path / path.name).unlink(missing_ok=True)
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="documents, but the manifest says"):
        build_facts(tmp_path)


def test_command_with_a_mixture(built: Path, written: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    mixture = {"web": {"path": str(built / "web"), "weight": 0.75}, "qa": {"path": str(built / "qa"), "weight": 0.25}}
    (tmp_path / "mix.yaml").write_text(json.dumps({"data": {"sequence_length": 8, "mixture": mixture}}))
    page = tmp_path / "page.html"
    options = ["--out", str(page), "--mixture", str(tmp_path / "mix.yaml"), "--tokens", "8K", "--json"]
    result = CliRunner().invoke(app, ["data", "report", str(built), *options])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    read = {row["source"]: row for row in facts.pop("mixture")["sources"]}
    assert {**facts, "mixture": None} == json.loads(json.dumps(written[0]))
    size = facts["sources"]["web"]["tokens"]
    assert read["web"]["passes"] == pytest.approx(750 / ((size - 1) // 8), rel=0.01)
    sources, rest = page.read_text(encoding="utf-8").split('id="lengths"')
    assert "What mix.yaml reads: 8K tokens" in sources and f"{read['web']['passes']:.3g}</td>" in sources
    assert "75.0%" in sources and "Not in this mixture: short_cot." in sources
    assert rest == written[1].split('id="lengths"')[1], "the same directory, the same bytes"
    alone = CliRunner().invoke(app, ["data", "report", str(built), "--tokens", "8K"])
    assert alone.exit_code != 0 and "--tokens without --mixture" in str(alone.exception)


@pytest.mark.parametrize("place", ["/proc/page.html", "report"])
def test_page_that_cannot_be_written_is_told(built: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(EnvironmentProblem, match=f"{place}: (cannot be written|is a directory).*fix: name another"):
        write_report(built, tmp_path / place)


def test_histogram_counts_every_document() -> None:
    lengths = np.array([1, 1, 2, 3, 1000, 1024, 2**31 - 1], np.int32)
    found = length_histogram(lengths)
    assert (found["shortest"], found["longest"], found["middle"]) == (1, 2**31 - 1, [3, 4])
    assert sum(one["documents"] for one in found["bins"]) == len(lengths)
    for one in found["bins"]:
        assert one["documents"] == int(((lengths >= one["from"]) & (lengths < one["below"])).sum()), one
    assert length_histogram(np.array([0, 5], np.int32))["shortest"] == 0
    assert length_histogram(np.array([], np.int32))["bins"] == []


def test_common_words_are_marked() -> None:
    found = mark_common("So: Janet's <ducks> lay 16 eggs. And more", "janet s ducks lay 16 eggs")
    assert found == "So: <mark>Janet&#x27;s &lt;ducks&gt; lay 16 eggs</mark>. And more"
    assert "<mark>" not in mark_common("a few words", "other few words")

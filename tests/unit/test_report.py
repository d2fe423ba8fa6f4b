from __future__ import annotations

import json
import random
import re
import struct
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_tools import Page

from megatron_octo.campaign import machine, report
from megatron_octo.campaign import page as page_module
from megatron_octo.campaign.curves import MOST_POINTS, smooth, thin
from megatron_octo.campaign.facts import build_facts
from megatron_octo.campaign.palette import branch_colours
from megatron_octo.campaign.record import read_record
from megatron_octo.errors import DataError
from megatron_octo.page.markup import FORMATS

STEP_TOKENS, STABLE_STEPS, BRANCH_STEPS = 1000, 40, 10
HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" ${title} </pre>'
BRANCHES = ("long", "short")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_run(out: Path, name: str, begin: int, steps: int, labels: list[str]) -> None:
    rows = [
        {
            "step": i, "tokens": begin + i * STEP_TOKENS, "run_tokens": i * STEP_TOKENS, "loss": 4.0 / (1 + i),
            "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5000.0, "seconds": 0.2,
            "layout": labels[(i - 1) * len(labels) // steps], "time": 1.0,
        }
        for i in range(1, steps + 1)
    ]  # fmt: skip
    write_lines(out / name / "metrics.jsonl", rows)


def write_state(out: Path, stage: str, seconds: float, status: str = "done") -> None:
    state = {"stage": stage, "status": status, "seconds": seconds, "attempts": 1, "started": 1.0, "ended": 2.0}
    write(out / "state" / f"{stage}.json", state)


def write_evaluation(out: Path, name: str, verdicts: list[str], length: float) -> None:
    share = verdicts.count("correct") / len(verdicts)
    scores = {"accuracy": share, "low": share - 0.05, "high": share + 0.05, "n_problems": len(verdicts)}
    scores |= {"mean_response_tokens": length, "format_rate": 0.875, "stop_rate": 1.0, "samples_per_problem": 1}
    rows = [
        {"pass": "greedy", "id": f"p{i}", "question": f"What is {i}?", "response": f"{HOSTILE} {i}", "gold": str(i),
         "verdict": verdict}
        for i, verdict in enumerate(verdicts)
    ]  # fmt: skip
    result = {"problems": {"n_problems": len(verdicts)}, "greedy": scores, "sampled": {**scores, "accuracy": share / 2}}
    write(out / "eval" / f"{name}.json", {**result, "samples": rows[:2]})
    write_lines(out / "eval" / f"{name}.responses.jsonl", rows + [{**rows[0], "pass": "sampled", "verdict": "wrong"}])


def write_branch(out: Path, name: str) -> None:
    fork = STABLE_STEPS * STEP_TOKENS
    write_run(out, name, fork, BRANCH_STEPS, ["DP2"])
    carried = {"weights": True, "moments": True, "rng": "fresh, seed 1"}
    write(out / name / "lineage.json", {"parent_run": "stable", "position": fork, "carried": carried})
    certificate = {
        "valid": name != "short", "failed": [], "coverage": {"passed": True, "tensors": 29, "covered": 29},
        "round_trip": {"passed": True, "bitwise": True},
        "logits": {"passed": True, "max_abs_difference": 2e-6, "kl": 1e-12, "greedy_match": 1.0},
    }  # fmt: skip
    write(out / "hf" / name / "certificate.json", certificate)
    rl = [{"step": i, "reward": 0.25 + 0.01 * i, "response_length": 20.0, "format": 0.9} for i in range(1, 6)]
    write_lines(out / "rl" / name / "metrics.jsonl", rl)
    write_evaluation(out, f"{name}-base", ["correct"] * 4 + ["wrong"] * 11 + ["no_answer"], 20.0)
    write_evaluation(out, f"{name}-rl", ["wrong"] + ["correct"] * 9 + ["wrong"] * 6, 24.5)


def fabricate(out: Path) -> Path:
    """A finished campaign with made-up figures."""
    branches = "".join(f"  {name}: {{tokens: 10000, mixture: {{web: 3, qa: 1}}}}\n" for name in BRANCHES)
    write(out / "campaign.yaml", f"name: made-up\nseed: 3\nstable: {{tokens: 40K}}\nrl: {{}}\nbranches:\n{branches}")
    sources = {"web": {"documents": 1200, "tokens": 50_000}, "qa": {"documents": 300, "tokens": 9_000}}
    write(out / "data" / "manifest.json", {"sources": sources, "problems": {"heldout": {"count": 16}}})
    hardware = {"cpu": "Made-up <CPU>", "cores": 2, "memory_bytes": 2**34, "gpus": []}
    write(out / "machine.json", {"hardware": hardware, "versions": {"megatron_octo": "9.9"}})
    write_run(out, "stable", 0, STABLE_STEPS, ["TP2 PP2 SP", "DP2"])
    for name in BRANCHES:
        write_branch(out, name)
    stages = ("data", "stable-1", "stable-2", *BRANCHES, "convert", "evaluate-base", "rl", "evaluate-rl")
    for number, stage in enumerate(stages, 1):
        write_state(out, stage, float(number))
    write_state(out, "report", 0.0, "running")
    return out


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="module")
def written(campaign: Path) -> tuple[dict[str, Any], str]:
    facts = report.write_report(campaign)
    return facts, (campaign / "report" / "index.html").read_text(encoding="utf-8")


def test_report_json_states_the_figures(campaign: Path, written: tuple[dict[str, Any], str]) -> None:
    facts = json.loads((campaign / "report" / "report.json").read_text(encoding="utf-8"))
    assert facts == written[0]
    stable = facts["stages"]["stable"]
    assert (stable["tokens"], stable["steps"], stable["wall_seconds"]) == (40_000, 40, 2.0 + 3.0)
    assert (stable["first_loss"], stable["last_loss"]) == (4.0 / 2, 4.0 / 41)
    assert stable["mean_last_loss"] == pytest.approx(sum(4.0 / (1 + i) for i in range(31, 41)) / 10)
    assert [(s["label"], s["from"], s["to"]) for s in stable["layouts"]] == [
        ("TP2 PP2 SP", 0, 20_000), ("DP2", 20_000, 40_000),
    ]  # fmt: skip
    assert facts["stages"]["long"]["position"] == 50_000
    assert facts["wall_seconds"] == sum(range(1, 10))
    assert list(facts["stages"]) == [
        "data", "stable", "long", "short", "convert", "evaluate-base", "rl", "evaluate-rl",
    ]  # fmt: skip
    assert facts["mixtures"]["long"] == {"web": 0.75, "qa": 0.25}
    assert facts["data"]["tokens"] == 59_000
    assert facts["certificates"] == {"valid": 1, "branches": 2}
    assert facts["hardware"]["cpu"] == "Made-up <CPU>" and facts["versions"]["megatron_octo"] == "9.9"
    assert len(facts["hashes"]["campaign.yaml"]) == 64 and "hf/long/certificate.json" in facts["hashes"]


def test_report_json_compares_before_and_after(written: tuple[dict[str, Any], str]) -> None:
    branch = written[0]["branches"]["long"]
    assert branch["problems"] == 16
    assert branch["fork"] == {
        "parent": "stable", "tokens": 40_000, "learning_rate": None,
        "carried": {"weights": True, "moments": True, "rng": "fresh, seed 1"},
    }  # fmt: skip
    assert branch["before"]["greedy"]["accuracy"] == 4 / 16 and branch["after"]["greedy"]["accuracy"] == 9 / 16
    assert branch["after"]["greedy"]["low"] == 9 / 16 - 0.05
    assert branch["change"]["greedy"] == {"accuracy": 5 / 16, "intervals_apart": True}
    assert branch["response_length"] == {"before": 20.0, "after": 24.5}
    assert branch["rl"]["steps"] == 5 and branch["rl"]["first_reward"] == pytest.approx(0.27)
    moved = branch["greedy_problem_by_problem"]  # p0 was lost, p4 to p9 were won; exact two-sided sign test of 1 in 7
    assert (moved["compared"], moved["became_right"], moved["became_wrong"]) == (16, 6, 1)
    assert moved["p_value"] == pytest.approx(2 * (1 + 7) / 2**7)


def test_every_figure_on_the_page_is_in_the_json(written: tuple[dict[str, Any], str]) -> None:
    facts, page = written
    stated = Page(page).stated
    for path, kind, text in stated:
        value: Any = facts
        for part in path.split("/"):
            value = value[part]
        assert text == FORMATS[kind](value), path
    shown = {path: text for path, _, text in stated}
    assert shown["branches/long/before/greedy/accuracy"] == "25.0%"
    assert shown["branches/long/after/greedy/accuracy"] == "56.2%"
    assert shown["branches/long/change/greedy/accuracy"] == "+31.2 points"
    assert shown["branches/long/response_length/after"] == "24.5"
    assert shown["stages/stable/tokens"] == "40K"
    assert shown["hardware/memory_bytes"] == "16 GiB"
    assert len(stated) > 120


def test_text_of_models_and_machines_is_escaped(written: tuple[dict[str, Any], str]) -> None:
    page = written[1]
    tags = {tag for tag, _ in Page(page).tags}
    assert "script" not in tags and "img" not in tags and "cpu" not in tags
    assert HOSTILE in unescape(page), "the text itself is shown in full"
    assert all(not name.startswith("on") for _, values in Page(page).tags for name in values)


def test_page_needs_nothing_from_outside(written: tuple[dict[str, Any], str]) -> None:
    page = written[1]
    assert "http" not in page and "@import" not in page
    tags = Page(page).tags
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in tags}
    references = [values[name] for _, values in tags for name in ("src", "href", "xlink:href") if name in values]
    references += re.findall(r"url\(([^)]*)\)", page)
    assert references and all(str(reference).startswith("#") for reference in references)
    ids = [values["id"] for _, values in tags if "id" in values]
    assert len(ids) == len(set(ids)), "pictures of one page must not share ids"
    assert {str(reference)[1:] for reference in references} <= set(ids)


def test_page_shows_all_parts(written: tuple[dict[str, Any], str]) -> None:
    page = written[1]
    assert page.count("<svg") == 8  # training wide and narrow, two accuracies, two lengths, reward, boxed answers
    assert "certificate valid" in page and "certificate INVALID" in page
    assert "not finished" not in page and "not yet" not in page
    assert "prefers-color-scheme:dark" in page


def test_samples_show_losses_beside_gains(written: tuple[dict[str, Any], str]) -> None:
    section = written[1].split("Sample answers")[1].split("Conversion certificates")[0]
    questions = re.findall(r"What is (\d+)\?", section)
    assert questions[:4] == ["4", "0", "1", "10"]  # became right, became wrong, stayed right, stayed wrong
    assert "p=sampled" not in section and section.count('class="answers"') == 4 * len(BRANCHES)


def test_same_directory_same_bytes(campaign: Path, written: tuple[dict[str, Any], str]) -> None:
    report.write_report(campaign)
    assert (campaign / "report" / "index.html").read_text(encoding="utf-8") == written[1]


def test_written_atomically(campaign: Path, written: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in (campaign / "report").iterdir()) == ["index.html", "report.json"]

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(page_module, "render_page", lambda record, facts: "another page")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        report.write_report(campaign)
    assert (campaign / "report" / "index.html").read_text(encoding="utf-8") == written[1]
    for leftover in (campaign / "report").glob(".*.tmp"):
        leftover.unlink()


def test_unfinished_campaign_says_what_is_missing(tmp_path: Path) -> None:
    out = fabricate(tmp_path / "half")
    for name in ("eval/short-rl.json", "rl/short/metrics.jsonl", "state/evaluate-rl.json", "data/manifest.json"):
        (out / name).unlink()
    write_state(out, "rl", 5.0, "failed")
    lines = (out / "short" / "metrics.jsonl").read_text().splitlines(keepends=True)
    write(out / "short" / "metrics.jsonl", "".join(lines[:6]) + '{"step": 7, "tok')
    facts = report.write_report(out)
    assert facts["complete"] is False
    assert facts["missing"] == [
        "stage rl: failed", "data manifest", "4,000 of 10,000 tokens of short", "RL metrics of short",
        "evaluation after RL of short",
    ]  # fmt: skip
    assert facts["notes"] == ["short/metrics.jsonl: 1 unreadable line left out"]
    assert facts["branches"]["short"]["after"] is None and facts["branches"]["short"]["change"]["greedy"] is None
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "not finished" in page and "RL metrics of short" in page and "not yet" in page


def test_campaign_without_rl_is_complete(tmp_path: Path) -> None:
    out = fabricate(tmp_path / "plain")
    write(out / "campaign.yaml", "name: plain\nrl: null\nbranches: {long: {}, short: {}}\n")
    for branch in BRANCHES:
        (out / "eval" / f"{branch}-rl.json").unlink()
        (out / "rl" / branch / "metrics.jsonl").unlink()
    facts = report.write_report(out)
    assert facts["complete"] and facts["missing"] == []
    assert "This campaign has no RL stage." in (out / "report" / "index.html").read_text(encoding="utf-8")


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a campaign directory"):
        report.write_report(tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is written where it does not belong"
    write(tmp_path / "campaign.yaml", "")
    facts = report.write_report(tmp_path)
    assert not facts["complete"] and facts["branches"] == {} and facts["stages"] == {}
    assert facts["hardware"]["recorded"] == "by the report" and any("machine.json" in note for note in facts["notes"])
    assert report.picture(tmp_path, tmp_path / "overview.png").stat().st_size > 1000
    with pytest.raises(DataError, match="not a campaign directory"):
        report.write_report(tmp_path / "nowhere")


def test_non_finite_numbers_are_told_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "render_page", lambda record, facts: "")
    out = fabricate(tmp_path / "nan")
    with (out / "stable" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tokens": 41000, "run_tokens": 41000, "loss": NaN, "layout": "DP2"}\n')
    report.write_report(out)
    text = (out / "report" / "report.json").read_text()
    assert "NaN" not in text
    facts = json.loads(text)
    assert facts["stages"]["stable"]["bad_steps"] == 1 and facts["stages"]["stable"]["last_loss"] == 4.0 / 41
    assert "stable: 1 of 41 steps have no finite loss" in facts["notes"]


JUNK = (None, [], {}, "text", -1, float("nan"), 10**12, True, {"passed": None}, [1, {"name": None}], "")


def test_any_damage_to_any_file_is_survived(tmp_path: Path) -> None:
    chance = random.Random(5)
    out = fabricate(tmp_path / "damaged")
    # Drawing is slow and sees only numbers that were checked: two rounds draw, all build the facts.
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix in (".json", ".jsonl")]
    whole = {path: path.read_text() for path in files}
    for turn in range(60):
        for path in chance.sample(files, 4):
            rows = [json.loads(line) for line in whole[path].splitlines()]
            row = chance.choice(rows)
            row[chance.choice(list(row))] = chance.choice(JUNK)
            write(path, chance.choice(("", "{", "\n".join(json.dumps(row) for row in rows))))
        record = read_record(out)
        facts = build_facts(record)
        json.dumps(facts, allow_nan=False)
        if turn % 30 == 0:
            page_module.render_page(record, facts)
        for path, text in whole.items():
            path.write_text(text)


def test_picture(campaign: Path, tmp_path: Path) -> None:
    path = report.picture(campaign, tmp_path / "docs" / "overview.png")
    data = path.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1600, 700)
    assert len(data) < 200_000
    assert [each.name for each in path.parent.iterdir()] == ["overview.png"]


def test_running_mean_keeps_lines_and_length() -> None:
    line = np.arange(50.0)
    assert np.allclose(smooth(line, 7)[:47], line[:47])
    noisy = np.random.default_rng(0).normal(size=1000)
    assert smooth(noisy, 101).std() < 0.2 and smooth(noisy, 101).size == 1000
    assert np.allclose(smooth(noisy, 1), noisy)


def test_thinning_keeps_spikes() -> None:
    y = np.zeros(50_000)
    y[31_234] = 9.0
    x, thinned = thin(np.arange(50_000.0), y)
    assert x.size <= MOST_POINTS and thinned.max() == 9.0 and x[thinned.argmax()] == 31_234


def test_colours_stay_with_their_branch() -> None:
    alone, all_three = branch_colours(["hybrid"]), branch_colours(["long", "tools", "hybrid"])
    assert alone["hybrid"] == all_three["hybrid"]
    assert len(set(all_three.values())) == 3


def test_machine_is_recorded(tmp_path: Path) -> None:
    described = machine.record_machine(tmp_path)
    assert json.loads((tmp_path / machine.MACHINE_FILE).read_text()) == described
    assert described["hardware"]["cores"] >= 1 and described["hardware"]["memory_bytes"] > 2**20
    assert described["versions"]["megatron_octo"]

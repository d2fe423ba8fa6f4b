"""A build that deduplicates and decontaminates: what is left out, where it is accounted for, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clean_tools import config_of, questions, write_benchmark
from typer.testing import CliRunner

from megatron_octo.cli.root import app
from megatron_octo.config.load import dump_config
from megatron_octo.data.clean import stages
from megatron_octo.data.engine import build
from megatron_octo.data.engine.manifest import verify_data
from megatron_octo.data.index.encode import load_encoder
from megatron_octo.data.index.pairs import read_index
from megatron_octo.errors import DataError
from megatron_octo.files import LOCK


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _config(folder: Path) -> Any:
    asked = questions(12, seed=3)
    (folder / "web").mkdir()
    _write(folder / "web" / "1.jsonl", ["one text", f"so: {asked[0]} and so on", "another text"])
    _write(folder / "web" / "2.jsonl", ["ONE  text", "a third text"])
    _write(folder / "qa.jsonl", ["another\ntext", f"Q: {asked[1]}", "a fourth text", f"Q: {asked[1]}"])
    return config_of(
        corpora={"web": {"path": str(folder / "web")}, "qa": {"path": str(folder / "qa.jsonl")}},
        deduplicate={"near": {"buckets": 4}, "partitions": 3},
        decontaminate={"against": {"made": write_benchmark(folder / "made.jsonl", asked)}, "measure": 6},
    )


def _files(out: Path) -> dict[str, bytes]:
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.timeout(120)
def test_build_leaves_out_and_accounts(tmp_path: Path) -> None:
    config = _config(tmp_path)
    manifest = build.build_data(config, tmp_path / "one")
    encoder = load_encoder(tmp_path / "one" / "tokenizer", config.index)
    kept = {"web": ["one text", "another text", "a third text"], "qa": ["a fourth text"]}
    for name, texts in kept.items():
        index = read_index(tmp_path / "one" / name)
        found = [encoder.decode(index.document(number).tolist()) for number in range(index.documents)]
        assert [text.removesuffix(encoder.decode([encoder.end])) for text in found] == texts
    accounts = {name: facts["accounts"] for name, facts in manifest["sources"].items()}
    assert accounts["web"]["removed"] == {"exact_duplicate": 1, "leak": 1}
    assert accounts["qa"]["removed"] == {"exact_duplicate": 1, "leak": 2}
    for account in accounts.values():
        assert account["read"] == account["documents"] + sum(account["removed"].values())
    cleaning = manifest["cleaning"]
    assert cleaning["corpora"]["qa"] == {
        "documents": 4, "removed": {"exact_duplicate": 1, "leak": 2}, "leaks": {"made": 2}
    }  # fmt: skip
    assert [removal["document"] for removal in cleaning["examples"]["exact_duplicate"]] == [
        "web/2.jsonl:1",
        "qa/qa.jsonl:1",
    ]
    assert cleaning["examples"]["leak"][0]["other"] == "made/q0"
    assert cleaning["recall"]["recall"]["verbatim"] == 1.0
    assert list(manifest["inputs"]["decontaminate.against.made"]) == ["made.jsonl"]
    assert build.build_data(config, tmp_path / "two", workers=2) == verify_data(tmp_path / "two") == manifest
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


@pytest.mark.timeout(120)
def test_a_benchmark_mended_before_the_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that were made from other removals are made again."""
    config = _config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(build, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.build_data(config, tmp_path / "out")
    write_benchmark(tmp_path / "made.jsonl", questions(12, seed=3)[1:])
    manifest = build.build_data(config, tmp_path / "out")
    assert manifest["sources"]["web"]["accounts"]["removed"] == {"exact_duplicate": 1}
    assert read_index(tmp_path / "out" / "web").documents == 4


@pytest.mark.timeout(120)
def test_a_benchmark_that_was_another_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compared with the other one counts for nothing, though the file is again what was hashed."""
    config, look, path = _config(tmp_path), stages.look, tmp_path / "made.jsonl"
    right = path.read_bytes()

    def other(*given: Any) -> dict[str, Any]:
        write_benchmark(path, questions(1, seed=4))
        try:
            return look(*given)
        finally:
            path.write_bytes(right)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "look", other)
        with pytest.raises(DataError, match="changed (while the build read it|since)"):
            build.build_data(config, tmp_path / "out")
    manifest = build.build_data(config, tmp_path / "out")
    assert manifest["sources"]["web"]["accounts"]["removed"] == {"exact_duplicate": 1, "leak": 1}


@pytest.mark.timeout(120)
def test_a_kept_copy_beyond_a_budget_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Corpus b loses its copies of what a has, also of the end of a, which a's budget leaves out; were it read whole it
    would lose none."""
    texts = [f"text number {number} of all" for number in range(12)]
    _write(tmp_path / "a.jsonl", texts)
    _write(tmp_path / "b.jsonl", [texts[0], *texts[9:], "a text of its own"])
    corpora = {"a": {"path": str(tmp_path / "a.jsonl"), "tokens": 20}, "b": {"path": str(tmp_path / "b.jsonl")}}
    config = config_of(corpora=corpora, deduplicate={"near": None})
    manifest = build.build_data(config, tmp_path / "whole")
    assert manifest["sources"]["a"]["documents"] < 9 and manifest["sources"]["b"]["documents"] == 5
    assert manifest["cleaning"]["corpora"]["a"]["removed"] == {"exact_duplicate": 4}
    assert manifest["cleaning"]["kept_beyond_budget"] == {} and "left out" not in capfd.readouterr().err
    assert build.build_data(config, tmp_path / "two", workers=2) == manifest
    assert _files(tmp_path / "two") == _files(tmp_path / "whole")
    corpora["b"]["tokens"] = 5
    config = config_of(corpora=corpora, deduplicate={"near": None})
    manifest = build.build_data(config, tmp_path / "out")
    assert manifest["sources"]["a"]["documents"] < 9 and manifest["sources"]["b"]["documents"] == 1
    assert manifest["cleaning"]["kept_beyond_budget"] == {"b": 3}
    assert "note: b: 3 documents are left out as duplicates of documents that lie beyond" in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_build_prints_what_it_did_not_compare(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", ["one text", "another text"])
    gone = {"path": str(tmp_path / "gone.jsonl"), "absent": "ok"}
    config = config_of(
        corpora={"a": {"path": str(tmp_path / "a.jsonl")}}, decontaminate={"against": {"gsm8k": gone}, "measure": 0}
    )
    dump_config(config, tmp_path / "mix.yaml")
    done = CliRunner().invoke(app, ["data", "build", str(tmp_path / "mix.yaml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "for their files are absent: gsm8k\n" in done.output
    assert verify_data(tmp_path / "out")["cleaning"]["benchmarks"] == {"gsm8k": None}


def test_two_renderings_of_a_file_have_the_same_items(tmp_path: Path) -> None:
    asked, path = questions(12, seed=3), tmp_path / "q.jsonl"
    items = [
        (text, " ".join(f"{name * step}" for step in range(1, 90))) for text, name in zip(asked, "abcde", strict=False)
    ]
    rows = [*items, (items[1][0].upper(), items[1][1]), (asked[11], "It is 7.")]
    path.write_text("".join(json.dumps({"question": one, "answer": other}) + "\n" for one, other in rows))
    read = {"path": str(path), "adapter": "qa"}
    settings = {
        "deduplicate": {"near": {"buckets": 14}, "partitions": 3},
        "decontaminate": {"against": {"made": write_benchmark(tmp_path / "made.jsonl", asked[11:])}, "measure": 0},
    }
    corpora = {"qa": {**read, "rendering": "qa"}, "prose": {**read, "rendering": "prose"}}
    manifest = build.build_data(config_of(corpora=corpora, **settings), tmp_path / "out")
    for name in corpora:
        account = manifest["sources"][name]["accounts"]
        assert (account["documents"], account["removed"]) == (5, {"exact_duplicate": 1, "leak": 1}), name
    with pytest.raises(DataError, match="both read"):
        build.build_data(config_of(corpora={**corpora, "as_published": read}, **settings), tmp_path / "other")

"""The whole data engine on its command line: parquet, compressed lines, duplicates, leaks, old and new tokenizers."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("r", "st", "n", "l")]
BUDGET = 600


def _text(chance: random.Random, words: int = 40) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words)) + "."


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Corpora with two exact duplicates, a near one, a leak, a question of the held-out problems, and a bad line."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder, chance = tmp_path_factory.mktemp("inputs"), random.Random(5)
    texts = [_text(chance) for _ in range(60)]
    questions = [f"How many {_text(chance, 16)[:-1]} are there in all?" for _ in range(5)]
    texts[7], texts[9] = texts[3], f"{_text(chance, 5)} {questions[0]} {_text(chance, 5)}"
    (folder / "web").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": texts[30 * number : 30 * number + 30], "url": ["x"] * 30})
        pyarrow.parquet.write_table(table, folder / "web" / f"{number}.parquet", row_group_size=10)
    lines = [json.dumps({"text": text}) for text in [texts[40], *(_text(chance) for _ in range(30)), ""]]
    lines.insert(5, json.dumps({"text": " ".join([*texts[20].split()[:-1], "end."])}))
    packed = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(packed, closefd=False) as stream:
        stream.write("\n".join(lines).encode() + b"\n")
    (folder / "more.jsonl.zst").write_bytes(packed.getvalue())
    for number in range(5):
        rows = "".join(json.dumps({"text": _text(chance)}) + "\n" for _ in range(6))
        (folder / f"some-{number}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    heldout = [{"id": f"h{n}", "question": f"What is {n} and {_text(chance, 9)}", "answer": "3"} for n in range(4)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    asked = [{"question": row["question"], "answer": "3"} for row in heldout[:1]]
    asked += [{"question": f"What is {_text(chance, 9)}", "answer": str(n)} for n in range(20)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    marks = [{"question": question, "answer": "#### 4"} for question in questions]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marks))
    return {
        "tokenizer": {"train": {"vocabulary_size": 400, "corpora": ["web"]}},
        "corpora": {
            "web": {"path": str(folder / "web")},
            "more": {"path": str(folder / "more.jsonl.zst")},
            "qa": {"path": str(folder / "qa.jsonl"), "adapter": "qa"},
            "some": {"path": str(folder / "some-*.jsonl.gz"), "tokens": BUDGET},
        },
        "problems": {"heldout": {"file": {"path": str(folder / "heldout.jsonl")}}},
        "on_bad_line": "skip",
        "deduplicate": {"near": {}},
        "decontaminate": {"against": {"gsm8k": {"path": str(folder / "gsm8k.jsonl")}}, "measure": 5},
    }


def _octo(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "megatron_octo.cli", "data", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing but what the user asked for"
    return done.stdout


def _files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_build_with_everything(inputs: dict[str, Any], tmp_path: Path) -> None:
    """One worker that trains a tokenizer, and two that are given it: the same bytes, and every record accounted for."""
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(inputs, sort_keys=False))
    _octo(tmp_path, "build", "mix.yaml", "--out", "one")
    given = {**inputs, "tokenizer": {"path": "one/tokenizer"}}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    _octo(tmp_path, "build", "given.yaml", "--out", "two", "--workers", "2")
    one, two = _files(tmp_path / "one"), _files(tmp_path / "two")
    assert one.keys() == two.keys() and [name for name in one if one[name] != two[name]] == ["manifest.json"]
    assert "every file is as its manifest says" in _octo(tmp_path, "verify", "two")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    sources = manifest["sources"]
    assert json.loads(two["manifest.json"])["sources"] == sources
    for name, facts in sources.items():
        account = facts["accounts"]
        kept = facts["documents"] + facts["beyond_budget"]["documents"]
        assert account["read"] == kept + sum(account["skipped"].values()) + sum(account["removed"].values()), name
    assert sources["web"]["accounts"]["read"] == 60 and sources["some"]["accounts"]["read"] < 30
    assert sources["some"]["beyond_budget"]["documents"] > 0
    assert sources["web"]["accounts"]["removed"] == {"exact_duplicate": 1, "leak": 1}
    assert sources["more"]["accounts"]["removed"] == {"exact_duplicate": 1, "near_duplicate": 1}
    assert sum(sources["more"]["accounts"]["skipped"].values()) == 1
    assert sources["qa"]["accounts"]["removed"] == {"heldout": 1}
    assert manifest["cleaning"]["corpora"]["web"]["leaks"] == {"gsm8k": 1}
    assert manifest["cleaning"]["recall"] is not None and manifest["cleaning"]["examples"]

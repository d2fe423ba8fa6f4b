"""What a careless user meets: one line that names the mistake, an exit code of its kind, nothing written."""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from megatron_octo.cli import root as cli

RUN: dict[str, Any] = {
    "name": "run",
    "out": "run",
    "dtype": "fp32",
    "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 300, "max_positions": 64},
    "data": {"tokenizer": "tokenizer", "mixture": {"web": {"path": "web", "weight": 1}}, "sequence_length": 32},
    "batch": {"global_batch": 8, "micro_batch": 2},
    "schedule": {"learning_rate": 1e-3, "tokens": "10K"},
    "checkpoint": {"every": "5K"},
}
DATA: dict[str, Any] = {
    "tokenizer": {"train": {"vocabulary_size": 300}},
    "world": {"tokens": {"web": "40K"}},
    "problems": {"heldout": {"count": 5}},
}
CORPUS = {"path": "gone.jsonl", "hint": "train.jsonl of some.example/texts"}
EVAL: dict[str, Any] = {
    "models": {"long": "model"},
    "problems": "problems.jsonl",
    "out": "results",
    "max_new_tokens": 8,
}
RL: dict[str, Any] = {
    "rl": {"rollouts": 1, "prompts": 4, "samples": 2, "mini_batch_prompts": 2, "micro_batch": 4,
           "rollout_micro_batch": 8, "max_response": 8, "max_prompt": 32},
    "runs": {"long": {"model": "model", "out": "rl", "problems": "problems.jsonl"}},
}  # fmt: skip
PROBLEM = {"id": "a", "question": "1+1?", "answer": "2"}
FILES: dict[str, Any] = {
    "run.yaml": RUN,
    "data.yaml": DATA,
    "eval.yaml": EVAL,
    "rl.yaml": RL,
    "run-typo.yaml": {**RUN, "modle": {}},
    "data-typo.yaml": {**DATA, "corpra": {}},
    "eval-typo.yaml": {**EVAL, "batchsize": 3},
    "rl-typo.yaml": {**RL, "rl": {**RL["rl"], "max_promt": 3}},
    "campaign-typo.yaml": {"base": "../recipes/demo.yaml", "stabel": {}},
    "circle.yaml": {"base": "circle.yaml"},
    "no-base.yaml": {"base": 3},
    "corpus.yaml": {**DATA, "corpora": {"text": CORPUS}},
    "eval-nothing.yaml": {**EVAL, "problems": "empty.jsonl"},
    "eval-template.yaml": {**EVAL, "template": "wrld"},
}
LINES = {
    "problems.jsonl": json.dumps(PROBLEM),
    "empty.jsonl": "",
    "cut.jsonl": '{"response": "x", ',
    "list.jsonl": '{"response": ["x"], "answer": "1", "stopped": true}',
    "unstopped.jsonl": '{"response": "x", "answer": "1"}',
    "empty.yaml": "",
    "bad.yaml": "a: [1",
    "a-file": "",
    "model/config.json": "{}",
    "model/model.safetensors": "",
    "model/tokenizer.json": "{}",
    "tokenizer/tokenizer.json": "{}",
    "folder/note": "not a campaign",
}

Octo = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every test finds in its directory, written once."""
    folder = tmp_path_factory.mktemp("traps")
    for name, values in FILES.items():
        (folder / name).write_text(yaml.safe_dump(values))
    for name, line in LINES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{line}\n")
    return folder


parser = functools.cache(typer.main.get_command)  # typer makes the parser of all commands anew for each call


@pytest.fixture
def octo(
    traps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Octo]:
    """`octo ARGUMENTS` inside this process, in a directory full of traps: exit code, stdout, stderr."""
    shutil.copytree(traps, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(typer.main, "get_command", parser)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OCTO_DATA", raising=False)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield run
    signal.signal(signal.SIGTERM, handler)


DEMO = "recipes/campaigns/demo.yaml"
MISTAKES = [
    # configuration
    (["train", "run-typo.yaml"], 2, ["run-typo.yaml", "modle", "'model'"]),
    (["train", "run.yaml", "data.sequence_lenght=3"], 2, ["data.sequence_lenght", "'sequence_length'"]),
    (["data", "build", "data-typo.yaml", "--out", "d"], 2, ["corpra", "'corpora'"]),
    (["eval", "run", "eval-typo.yaml"], 2, ["batchsize", "'batch_size'"]),
    (["rl", "train", "rl-typo.yaml"], 2, ["rl.max_promt", "'max_prompt'"]),
    (["rl", "command", "rl-typo.yaml"], 2, ["rl.max_promt", "'max_prompt'"]),
    (["campaign", "run", DEMO, "stabel.tokens=1K", "--out", "c"], 2, ["stabel", "'stable'"]),
    (["campaign", "run", DEMO, "seed=-1", "--out", "c"], 2, ["seed = -1", "greater than or equal to 0"]),
    (["campaign", "run", DEMO, "branches.long.parallel.tensor=3", "--out", "c"], 2, ["tensor = 3", "model.heads = 4"]),
    (["train", "missing.yaml"], 2, ["missing.yaml", "no such file"]),
    (["data", "build", "missing.yaml", "--out", "d"], 2, ["missing.yaml", "no such file"]),
    (["rl", "train", "missing.yaml"], 2, ["missing.yaml", "no such file"]),
    (["eval", "run", "missing.yaml"], 2, ["missing.yaml", "no such file"]),
    (["campaign", "run", "demmo.yaml", "--out", "c"], 2, ["demmo.yaml", "no such file", DEMO]),
    (["train", "folder"], 2, ["folder", "cannot be read"]),
    (["train", "empty.yaml"], 2, ["empty.yaml", "is empty"]),
    (["train", "bad.yaml"], 2, ["bad.yaml", "not valid YAML"]),
    (["train", "circle.yaml"], 2, ["circle.yaml", "builds on itself"]),
    (["train", "no-base.yaml"], 2, ["no-base.yaml", "base = 3"]),
    (["train", "run.yaml", "name=2020-13-45"], 2, ["name=2020-13-45", "not valid YAML"]),
    (["train", "run.yaml", "parallel.tensor=3"], 2, ["parallel.tensor = 3", "model.heads = 4", "[1, 2, 4]"]),
    (["train", "run.yaml", "batch.micro_batch=3"], 2, ["batch.global_batch = 8", "micro_batch 3"]),
    (["train", "run.yaml", "data.sequence_length=65"], 2, ["sequence_length = 65", "max_positions = 64"]),
    # data
    (["train", "run.yaml", "data.tokenizer=gone"], 3, ["data.tokenizer = gone", "no such directory"]),
    (["data", "corpora", "openwebmth"], 2, ["no such adapter", "'openwebmath'"]),
    (["data", "build", "corpus.yaml", "--out", "d"], 3, ["corpora.text: gone.jsonl", CORPUS["hint"]]),
    (["data", "build", "data.yaml", "--out", "d", "--workers", "0"], 2, ["workers = 0", "1 or more"]),
    (
        ["data", "build", "data.yaml", "--out", "d", "--executor", "dask"],
        2,
        ["'dask'", "local, ray or slurm"],
    ),
    (["data", "work", "data.yaml", "--out", "d", "--stage", "join", "--share", "2"], 2, ["--share 2", "0/8"]),
    (["data", "build", "data.yaml", "--out", "/proc/d"], 6, ["/proc/d: cannot be made", "another --out"]),
    (["data", "dedup", "problems.jsonl", "--out", "/proc/d"], 6, ["/proc/d: cannot be made", "another --out"]),
    (
        ["data", "decontaminate", "--against", "gsm8k=problems.jsonl", "--measure", "--out", "/proc/d"],
        6,
        ["/proc/d: cannot be written", "another --out"],
    ),
    (["data", "inspect", "gone"], 3, ["gone holds no finished build, and gone.bin does not exist", "octo data build"]),
    (["eval", "run", "eval-nothing.yaml"], 3, ["empty.jsonl", "holds no problem"]),
    (["eval", "grade", "cut.jsonl"], 3, ["cut.jsonl line 1", "not JSON"]),
    (["eval", "grade", "list.jsonl"], 3, ["list.jsonl line 1", "response is list"]),
    (["eval", "grade", "unstopped.jsonl"], 3, ["unstopped.jsonl line 1", "no 'stopped'"]),
    (["eval", "grade", "empty.jsonl"], 3, ["empty.jsonl", "holds no line"]),
    (["eval", "run", "eval-template.yaml"], 2, ["wrld", "'world'"]),
    (["campaign", "status", "folder"], 2, ["folder", "not a campaign directory"]),
    (["campaign", "report", "folder"], 3, ["folder", "not a campaign directory"]),
    # checkpoints and certificates
    (["train", "run.yaml", "start.fork.parent=gone"], 4, ["gone", "no such run directory", "start.fork.parent"]),
    (["train", "run.yaml", "start.fork={parent: folder, at: 4K}"], 4, ["folder", "no checkpoint at 4000 tokens"]),
    (["train", "run.yaml", "start.checkpoint=folder"], 4, ["folder", "start.checkpoint"]),
    (["convert", "to-hf", "gone", "out"], 4, ["gone", "no such directory"]),
    (["convert", "verify", "model"], 5, ["model/certificate.json", "octo convert to-hf"]),
    (["rl", "train", "rl.yaml"], 5, ["model/certificate.json", "octo convert to-hf"]),
    # places that cannot be written
    (["train", "run.yaml", "out=a-file"], 6, ["a-file", "a directory is needed"]),
    (["data", "build", "data.yaml", "--out", "a-file"], 6, ["a-file", "a directory is needed"]),
    (["data", "build", "data.yaml", "--out", "a-file/d"], 6, ["a-file", "a directory is needed"]),
    (["campaign", "run", DEMO, "--out", "a-file"], 6, ["a-file", "--out"]),
]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    MISTAKES,
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_changes_nothing(
    octo: Octo, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    before = _tree(tmp_path)
    found, out, err = octo(*arguments)
    assert found == code and out == "", err
    assert err.startswith("octo: error: ") and err.count("\n") == 1, err
    assert [word for word in words if word not in err] == [], err
    assert _tree(tmp_path) == before


def test_corpora_are_shown(octo: Octo) -> None:
    code, out, err = octo("data", "corpora")
    assert (code, err) == (0, "")
    table, _, legend = out.partition("\n\n")
    header, *rows = table.splitlines()
    lines = {line.split()[0]: line for line in rows}
    assert header.split() == ["name", "tokens", "form", "access", "published", "as"]
    assert all(f"{word} " in legend for word in ("-", "?", "gated:", "refused:"))
    assert len(lines) > 25 and lines["mathpile"].split()[1:] == ["9.5B", "?", "jsonl.gz", "gated", "GAIR/MathPile"]
    assert "refused" in lines["megamath-code"]
    code, out, _ = octo("data", "corpora", "openr1-math-220k")
    assert code == 0 and "open-r1/OpenR1-Math-220k" in out and "Apache-2.0" in out and "verified and complete" in out
    told = octo("data", "corpora", "text")[1]
    assert "None" not in told and all(len(line.split()) > 1 for line in told.splitlines())
    found = json.loads(octo("data", "corpora", "--json")[1])
    assert set(found) == set(lines) and found["finemath-4plus"]["files"] == "finemath-4plus/*.parquet"
    assert json.loads(octo("data", "corpora", "wildchat", "--json")[1])["fields"]["model"] == "required"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--seed", "-1"], "--seed"),
        (["train", "run.yaml", "--until", "soon"], "--until"),
        (["convert", "to-hf", "only-one"], "CHECKPOINT OUT"),
        (["data", "build", "data.yaml"], "--out"),
        (["trian"], "trian"),
    ],
)
def test_wrong_usage_is_told_without_a_traceback(octo: Octo, tmp_path: Path, arguments: list[str], word: str) -> None:
    before = _tree(tmp_path)
    code, _, err = octo(*arguments)
    assert code == 2 and word in err and "Traceback" not in err
    assert _tree(tmp_path) == before


def test_a_build_says_what_it_made_of_each_source_and_what_it_left_out(octo: Octo, tmp_path: Path) -> None:
    texts = ["one text", "another text", "one text", "a third text"]
    lines = [*(json.dumps({"text": text}) for text in texts), "{cut"]
    (tmp_path / "text.jsonl").write_text("".join(f"{line}\n" for line in lines))
    skipping = {"on_bad_line": "skip", "deduplicate": {"near": None}, "corpora": {"text": {"path": "text.jsonl"}}}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump({"tokenizer": DATA["tokenizer"], **skipping}))
    again = ("data", "build", "some.yaml", "--out", "my d")
    code, out, err = octo(*again)
    made = json.loads((tmp_path / "my d" / "manifest.json").read_text())
    tokens, first = made["tokens"], made["sources"]["text"]["accounts"]["first"][0]
    assert first.startswith("text.jsonl:5: not JSON (")
    assert (
        code == 0
        and "warning" not in err
        and out.splitlines()
        == [
            f"text: 3 documents, {tokens} tokens; 1 skipped (1 not JSON), first {first}; "
            "1 removed (1 exact duplicate); my d/text",
            f"total: 3 documents, {tokens} tokens; deduplicated (exact), not decontaminated; "
            f"vocabulary {made['tokenizer']['rows']} (my d/tokenizer)",
            "next: octo data inspect 'my d/text'; octo data report 'my d'; octo data verify 'my d'",
        ]
    )
    listed = json.loads(octo("data", "inspect", "my d", "--json")[1])
    assert listed["pairs"] == [{"prefix": "my d/text", "documents": 3, "tokens": tokens}]
    looked = octo("data", "inspect", "my d/text")[1]
    assert "not compared" not in looked and looked.index("samples ") < looked.index("sha256")
    facts = json.loads(octo("data", "verify", "my d", "--json")[1])
    assert facts["whole"] and facts["sources"] == {"text": {"documents": 3, "tokens": tokens}}
    assert "\ndone: nothing, for the directory was finished and whole\nnext: " in octo(*again)[1]
    (tmp_path / "my d" / "text.bin").unlink()
    (tmp_path / "my d" / "problems" / "train.jsonl").unlink()
    assert json.loads(octo(*again, "--json")[1])["done"] == ["repaired text, problems/train.jsonl"]


def test_jobs_are_submitted_by_a_command_that_a_shell_reads(octo: Octo, tmp_path: Path) -> None:
    code, out, _ = octo("data", "build", "data.yaml", "--out", "my d", "--executor", "slurm")
    script = tmp_path / "my d" / ".work" / "slurm" / "submit.sh"
    assert (code, shlex.split(out)) == (0, ["submit", "the", "jobs", "with:", "bash", str(script)])


def test_a_corpus_that_loses_most_of_its_records_is_told_aloud(octo: Octo, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{cut\n{cut\n')
    values = {"on_bad_line": "skip", "corpora": {"text": {"path": "text.jsonl"}}}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump({"tokenizer": DATA["tokenizer"], **values}))
    assert "warning" not in octo("data", "build", "some.yaml", "--out", "half")[2]
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{cut\n{cut\n')
    code, out, err = octo("data", "build", "some.yaml", "--out", "d")
    said = "text: 2 of 3 records are left out (2 skipped (2 not JSON); 0 removed); see octo data report d"
    assert code == 0 and err.splitlines()[-1] == f"octo: warning: {said}"
    assert "; not deduplicated, not decontaminated; " in out


@pytest.mark.timeout(120)
@pytest.mark.parametrize("limit", [400, 4_000, 20_000], ids=["at once", "in the tokenizer", "in the tokens"])
def test_where_nothing_more_fits_nothing_is_left_half_written(octo: Octo, tmp_path: Path, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write beyond it fails as on a full disk
    try:
        code, _, err = octo("data", "build", "data.yaml", "--out", "my data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 6 and err == (
        "octo: error: file too large; what was finished before is untouched; "
        "fix: make room, then run the same command again\n"
    )
    assert not (tmp_path / "my data" / "manifest.json").exists() and _leftovers(tmp_path) == []
    assert octo("data", "build", "data.yaml", "--out", "my data")[0] == 0
    assert octo("data", "verify", "my data")[0] == 0


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "place: no space left on device"),
        (errno.EDQUOT, "place: disk quota exceeded"),
        (errno.EACCES, "place: permission denied"),
        (errno.EROFS, "place: read-only file system"),
        (errno.EISDIR, "place: is a directory"),
    ],
)
def test_what_the_system_refuses_is_told(octo: Octo, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    from megatron_octo.convert import api

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), "place")

    monkeypatch.setattr(api, "show", refuse)
    code, _, err = octo("convert", "show", "model")
    assert code == 6 and err.startswith(f"octo: error: {words}") and err.count("\n") == 1


def test_a_defect_of_our_own_keeps_its_traceback(octo: Octo, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_octo.convert import api

    def fail(path: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone", "forgotten")

    monkeypatch.setattr(api, "show", fail)
    monkeypatch.setattr(sys, "argv", ["octo", "convert", "show", "model"])
    with pytest.raises(FileNotFoundError):
        cli.main()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_goes_on_when_given_again(
    octo: Octo, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "megatron_octo.cli", "data", "build", "data.yaml", "--out", "my data"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=_heed_interrupts)
    while not (tmp_path / "my data" / ".work" / "build.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert ("the same command goes on" in err) == (number == signal.SIGINT)
    assert not (tmp_path / "my data" / "manifest.json").exists() and _leftovers(tmp_path) == []
    assert octo("data", "build", "data.yaml", "--out", "my data")[0] == 0
    assert octo("data", "verify", "my data")[0] == 0


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background of a script inherits a deaf ear


def _leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".partial" in path.name or path.name.endswith(".tmp")]


def _tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}

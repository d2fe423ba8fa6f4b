"""Faults of a data build: killed workers and builds, full disks, two writers, inputs that change, bad lines."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.engine import publish, tasks
from megatron_octo.data.engine.build import build_data, only_writer
from megatron_octo.data.engine.manifest import verify_data
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.files import LOCK

LINES = 30


def _settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Three corpora of a few lines and a tokenizer trained on the first of them."""
    for name in ("one", "two", "three"):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            path.write_text("".join(_line(name, number) for number in range(LINES)))
    return {
        "tokenizer": {"train": {"vocabulary_size": 300, "corpora": ["one"]}},
        "corpora": {name: {"path": str(folder / f"{name}.jsonl")} for name in ("one", "two", "three")},
        **changes,
    }


def _line(name: str, number: int) -> str:
    return json.dumps({"text": f"{name}: text {number} of some words and {number * 7} more"}) + "\n"


def _config(folder: Path, **changes: Any) -> DataBuildConfig:
    return parse_config(DataBuildConfig, _settings(folder, **changes), "test")


def _files(out: Path) -> dict[str, bytes]:
    """What is published: everything but the lock and the work that is left."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != LOCK and ".work" not in path.relative_to(out).parts
    }


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Corpora of the pieces that are made, in order."""
    found: list[str] = []
    plain = tasks.tokenise

    def note(build: tasks.Build, piece: tasks.Piece) -> dict[str, Any]:
        facts = plain(build, piece)
        found.append(piece.shard.corpus)
        return facts

    monkeypatch.setattr("megatron_octo.data.engine.plan.tokenise", note)
    return found


def _octo(folder: Path, *options: str, before: Any = None, **settings: Any) -> subprocess.Popen[str]:
    """`octo data build` of a build that takes some seconds, in a process of its own."""
    big = {"tokenizer": {"train": {"vocabulary_size": 300, "documents": 50}}, "world": {"tokens": settings}}
    (folder / "data.yaml").write_text(yaml.safe_dump(big))
    command = [sys.executable, "-m", "megatron_octo.cli", "data", "build", "data.yaml", "--out", "out", *options]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=before)


def _busy_workers(process: subprocess.Popen[str], out: Path) -> list[int]:
    """Ids of the worker processes, once they have begun with the pieces."""
    while not list(out.glob(".work/pieces/**/*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


# -- H1


def test_mixed_bad_lines_stop_the_build_by_name_or_are_counted(tmp_path: Path) -> None:
    bad = [b"{cut", b'{"text": "\xff"}', b"", b'{"text": null}', b'{"title": "no text"}', b"[1]", b'{"text": "\x00"}']
    lines = [_line("one", number).encode().rstrip() for number in range(LINES)]
    for number, line in enumerate(bad):
        lines.insert(3 * number + 2, line)
    (tmp_path / "one.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match=r"one.jsonl, line 3: not JSON"):
        build_data(_config(tmp_path), tmp_path / "strict")
    assert _files(tmp_path / "strict") == {}
    facts = build_data(_config(tmp_path, on_bad_line="skip"), tmp_path / "skip")["sources"]["one"]
    accounts = facts["accounts"]
    assert (accounts["documents"], sum(accounts["skipped"].values())) == (LINES, len(bad))
    assert [line.split(":")[1] for line in accounts["first"]] == [f"{3 * number + 3}" for number in range(len(bad))]


# -- H2


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_killed_worker_ends_the_build_with_one_line_and_nothing_is_published(tmp_path: Path) -> None:
    process = _octo(tmp_path, "--workers", "2", web="3M", short_cot="3M")
    workers = _busy_workers(process, tmp_path / "out")
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 7 and said.startswith("octo: error: a data worker was killed by SIGKILL at task ")
    assert said.count("\n") == 1 and "fix: start the same command again" in said
    assert _files(tmp_path / "out") == {}
    assert not Path(f"/proc/{workers[0]}").exists(), "the other worker ends as well"


# -- H3


@pytest.mark.timeout(60)
def test_a_second_start_repeats_nothing_that_was_finished(tmp_path: Path, noted: list[str]) -> None:
    config, whole = _config(tmp_path), (tmp_path / "three.jsonl").read_text()
    (tmp_path / "three.jsonl").write_text(whole + "broken\n")
    with pytest.raises(DataError, match="three.jsonl, line 31"):
        build_data(config, tmp_path / "out")
    assert noted == ["one", "two"]
    (tmp_path / "three.jsonl").write_text(whole)
    build_data(config, tmp_path / "out")
    assert noted == ["one", "two", "three"]


def test_publishing_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: list[str]
) -> None:
    plain, renamed = publish.place, []

    def die(source: Path, target: Path) -> None:
        if len(renamed) == 3:
            raise KeyboardInterrupt
        renamed.append(target.name)
        plain(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "place", die)
        build_data(_config(tmp_path), tmp_path / "out")
    assert len(renamed) == 3 and not (tmp_path / "out" / "manifest.json").exists()
    noted.clear()
    with monkeypatch.context() as patch:
        patch.setattr("megatron_octo.data.engine.inputs.hash_input", None)  # nor are the inputs read again
        build_data(_config(tmp_path), tmp_path / "out")
    assert noted == [] and not (tmp_path / "out" / ".work").exists()
    verify_data(tmp_path / "out")


# -- H4


def test_two_writers_on_one_directory(tmp_path: Path) -> None:
    build_data(_config(tmp_path), tmp_path / "out")
    before = _files(tmp_path / "out")
    with only_writer(tmp_path / "out"), pytest.raises(DataError, match=rf"written by another process .*{os.getpid()}"):
        build_data(_config(tmp_path), tmp_path / "out")
    assert _files(tmp_path / "out") == before


# -- H5


def test_an_input_changed_between_two_starts_is_seen(tmp_path: Path, noted: list[str]) -> None:
    """Same size, other words: what was made of it is made again, and nothing else."""
    config, whole = _config(tmp_path), (tmp_path / "three.jsonl").read_text()
    (tmp_path / "three.jsonl").write_text(whole + "broken\n")
    with pytest.raises(DataError):
        build_data(config, tmp_path / "out")
    (tmp_path / "three.jsonl").write_text(whole)
    text = (tmp_path / "two.jsonl").read_text()
    (tmp_path / "two.jsonl").write_text(text.replace("some words", "same words"))
    noted.clear()
    build_data(config, tmp_path / "out")
    assert noted == ["two", "three"]
    build_data(config, tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


def test_an_input_of_the_tokenizer_that_changed_makes_everything_again(tmp_path: Path, noted: list[str]) -> None:
    config, whole = _config(tmp_path), (tmp_path / "three.jsonl").read_text()
    (tmp_path / "three.jsonl").write_text(whole + "broken\n")
    with pytest.raises(DataError):
        build_data(config, tmp_path / "out")
    (tmp_path / "three.jsonl").write_text(whole)
    (tmp_path / "one.jsonl").write_text((tmp_path / "one.jsonl").read_text().replace("some words", "same words"))
    noted.clear()
    build_data(config, tmp_path / "out")
    assert noted == ["one", "two", "three"]
    build_data(config, tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


def test_an_input_of_a_finished_build_that_changed_is_refused_by_name(tmp_path: Path) -> None:
    build_data(_config(tmp_path), tmp_path / "out")
    before = _files(tmp_path / "out")
    (tmp_path / "two.jsonl").write_text((tmp_path / "two.jsonl").read_text().replace("some words", "same words"))
    with pytest.raises(ConfigError, match=r"holds another build: inputs.corpora.two.two.jsonl.sha256"):
        build_data(_config(tmp_path), tmp_path / "out")
    assert _files(tmp_path / "out") == before


@pytest.mark.parametrize("when", ["as it is read", "after it was read"])
def test_an_input_that_changes_while_the_build_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    plain, changed = tasks.tokenise, tmp_path / "two.jsonl"
    config = _config(tmp_path)

    def meddle(build: tasks.Build, piece: tasks.Piece) -> dict[str, Any]:
        if (
            piece.shard.corpus == ("two" if when == "as it is read" else "three")
            and "9 words" not in changed.read_text()
        ):
            changed.write_text(changed.read_text() + _line("9 words", 9))
        return plain(build, piece)

    monkeypatch.setattr("megatron_octo.data.engine.plan.tokenise", meddle)
    with pytest.raises(DataError, match=r"two.jsonl changed while the build read it.*fix: start the same command"):
        build_data(config, tmp_path / "out")
    assert _files(tmp_path / "out") == {}
    assert build_data(config, tmp_path / "out")["sources"]["two"]["documents"] == LINES + 1
    verify_data(tmp_path / "out")


def test_what_was_read_of_a_file_that_was_another_for_a_while_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is itself again, to the hash, when the build is started again."""
    config, changed = _config(tmp_path), tmp_path / "two.jsonl"
    plain, before = tasks.tokenise, changed.read_text()

    def meddle(build: tasks.Build, piece: tasks.Piece) -> dict[str, Any]:
        if piece.shard.corpus == "two":
            changed.write_text(before.replace("some words", "same words"))
        return plain(build, piece)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="changed while the build read it"):
        patch.setattr("megatron_octo.data.engine.plan.tokenise", meddle)
        build_data(config, tmp_path / "out")
    changed.write_text(before)
    build_data(config, tmp_path / "out")
    build_data(config, tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


# -- C2


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_disk_that_is_full_for_the_workers_leaves_nothing_published(tmp_path: Path) -> None:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    command = [
        sys.executable,
        "-m",
        "megatron_octo.cli",
        "data",
        "build",
        "data.yaml",
        "--out",
        "out",
        "--workers",
        "2",
    ]
    _octo(tmp_path, web="60K", short_cot="60K").kill()
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=full, capture_output=True, text=True, timeout=100)
    assert done.returncode == 6 and done.stderr.startswith("octo: error: ") and done.stderr.count("\n") == 1
    assert "file too large" in done.stderr and "fix: make room" in done.stderr
    assert _files(tmp_path / "out") == {}
    assert subprocess.run(command, cwd=tmp_path, timeout=100).returncode == 0
    verify_data(tmp_path / "out")


# -- places


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system here")
def test_the_result_may_go_to_another_file_system(tmp_path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert os.stat(folder).st_dev != tmp_path.stat().st_dev
        (tmp_path / "link").symlink_to(Path(folder) / "data")
        (Path(folder) / "data").mkdir()
        build_data(_config(tmp_path), tmp_path / "link")
        verify_data(Path(folder) / "data")


# -- what is left out


def _cleaned(folder: Path) -> DataBuildConfig:
    """The same corpora, each of whose documents is there twice, without duplicates."""
    config = _config(folder, deduplicate={})
    for name in config.corpora:
        path = folder / f"{name}.jsonl"
        path.write_text(path.read_text() * 2)
    return config


def test_a_file_that_changes_while_duplicates_are_sought_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was noted of it is not used, though the file is itself again when the build is started again."""
    from megatron_octo.data.clean import stages

    config, changed = _cleaned(tmp_path), tmp_path / "two.jsonl"
    plain, before = stages.look, changed.read_text()

    def meddle(cleaning: Any, part: Any) -> dict[str, Any]:
        if part.shard.corpus == "two":
            changed.write_text(before.replace("some words", "same words", 7))
        return plain(cleaning, part)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="two.jsonl changed while the build read it"):
        patch.setattr(stages, "look", meddle)
        build_data(config, tmp_path / "out")
    changed.write_text(before)
    facts = build_data(config, tmp_path / "out")["sources"]["two"]
    assert facts["accounts"]["removed"] == {"exact_duplicate": LINES} and facts["documents"] == LINES
    build_data(config, tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


def test_shards_that_other_workers_made_beyond_the_budget_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many").mkdir()
    for number in range(4):
        (tmp_path / "many" / f"{number}.jsonl").write_text("".join(_line(str(number), n) for n in range(LINES)))
    corpora = {"one": {"path": str(tmp_path / "one.jsonl")}, "many": {"path": str(tmp_path / "many"), "tokens": 900}}
    config = _config(tmp_path, corpora=corpora)
    manifest = build_data(config, tmp_path / "in order")
    account = manifest["sources"]["many"]["accounts"]
    assert account["read"] < 4 * LINES
    monkeypatch.setattr(tasks, "_tokens_before", lambda build, piece, budget: 0)
    assert build_data(config, tmp_path / "all at once") == manifest
    assert _files(tmp_path / "all at once") == _files(tmp_path / "in order")

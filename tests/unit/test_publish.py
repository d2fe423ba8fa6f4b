"""A directory appears complete or not at all, and its making goes on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_octo import publish
from megatron_octo.errors import ConfigError, EnvironmentProblem
from megatron_octo.files import hold
from megatron_octo.locations import locate
from megatron_octo.publish import publishing, refuse_existing

MADE_FROM = {"source": "abc", "sizes": [1, 2]}

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_octo.publish import publishing, refuse_existing
with publishing(Path(sys.argv[1]), {"sizes": (1, 2), "source": "abc"}, "last") as partial:
    for name in ("one", "two"):
        (partial.directory / name).write_text(name)
        if name == "one":
            partial.finish(name, {"hash": 7})
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "model"


def _interrupted(target: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "deep").mkdir()
        for name in ("one", "deep/two", "three"):
            (partial.directory / name).write_text(name)
        partial.finish("one", {"hash": 7})
        partial.finish("deep/two", {})
        raise KeyboardInterrupt


def test_it_appears_complete_and_leaves_nothing_beside_it(target: Path) -> None:
    with publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "deep").mkdir()
        (partial.directory / "deep" / "one").write_text("1")
        (partial.directory / "last").touch()
        assert not target.exists()
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == ["deep", "deep/one", "last"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError("disk"), ConfigError("mistake")])
def test_an_error_leaves_nothing(target: Path, error: Exception) -> None:
    with pytest.raises(type(error)), publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "one").touch()
        partial.finish("one", {})
        raise error
    assert list(target.parent.iterdir()) == []


def test_it_is_not_published_without_the_file_that_vouches_for_it(target: Path) -> None:
    with pytest.raises(ValueError, match="made without last"), publishing(target, MADE_FROM, "last"):
        pass
    assert list(target.parent.iterdir()) == []


def test_after_a_kill_finished_files_serve_and_others_go(target: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    with publishing(target, MADE_FROM, "last") as partial:
        assert partial.finished("one") == {"hash": 7}
        assert partial.finished("two") is None
        assert not (partial.directory / "two").exists()
        (partial.directory / "last").touch()
    assert sorted(path.name for path in target.iterdir()) == ["last", "one"]
    assert (target / "one").read_text() == "one"


def test_an_interrupt_keeps_what_was_finished_also_in_folders(target: Path) -> None:
    _interrupted(target)
    with publishing(target, MADE_FROM, "last") as partial:
        assert (partial.finished("deep/two"), partial.finished("three")) == ({}, None)
        (partial.directory / "last").touch()
    assert (target / "deep" / "two").read_text() == "deep/two"
    assert not (target / "three").exists()


def test_another_origin_starts_over(target: Path) -> None:
    _interrupted(target)
    with publishing(target, {**MADE_FROM, "source": "xyz"}, "last") as partial:
        assert partial.finished("one") is None
        assert {path.name for path in partial.directory.iterdir()} == {".lock", ".journal.json"}
        (partial.directory / "last").touch()


def test_a_finished_file_that_changed_its_size_is_made_again(target: Path) -> None:
    _interrupted(target)
    left = target.parent / ".model.partial"
    (left / "one").write_text("on")
    (left / "deep" / "two").unlink()
    with publishing(target, MADE_FROM, "last") as partial:
        assert partial.finished("one") is None
        assert partial.finished("deep/two") is None
        assert not (partial.directory / "deep").exists()
        (partial.directory / "last").touch()


def test_what_exists_is_never_written_over(target: Path) -> None:
    for make in (target.mkdir, target.touch, lambda: target.symlink_to("nowhere")):
        make()
        with pytest.raises(ConfigError, match="already exists"), publishing(target, MADE_FROM, "last"):
            raise AssertionError
        target.rmdir() if target.is_dir() else target.unlink()
    with pytest.raises(ConfigError, match="already exists"), publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "last").touch()
        target.mkdir()  # a rename would replace an empty directory without a word
    assert list(target.parent.iterdir()) == [target]


def test_two_processes_do_not_make_one_directory(target: Path) -> None:
    with publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "last").touch()
        held = pytest.raises(ConfigError, match=f"process {os.getpid()} is making it")
        with held, publishing(target, MADE_FROM, "last"):
            raise AssertionError
    assert target.is_dir()


def test_the_lock_of_a_directory_that_went_away_does_not_count(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stolen = []

    def late(directory: Path) -> object:
        lock = hold(directory)
        if not stolen:
            stolen.append((directory / ".lock").unlink())
        return lock

    monkeypatch.setattr(publish, "hold", late)
    with publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "last").touch()
        with pytest.raises(ConfigError, match="is making it"), publishing(target, MADE_FROM, "last"):
            raise AssertionError


def test_everything_is_durable_before_it_appears(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(publish, "flush_to_disk", lambda path: flushed.append((path, target.exists())))
    with publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "deep").mkdir()
        for name in ("deep/one", "last"):
            (partial.directory / name).touch()
    names = {".model.partial", ".model.partial/deep", ".model.partial/deep/one", ".model.partial/last"}
    assert {str(path.relative_to(target.parent)) for path, appeared in flushed if not appeared} == names
    assert flushed[-1] == (target.parent, True)


def test_a_remote_directory_gets_its_last_file_at_the_end(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, sent = locate(f"memory:/{target}"), []
    put = type(remote.fs).put_file
    monkeypatch.setattr(type(remote.fs), "put_file", lambda fs, *names: (sent.append(names[1]), put(fs, *names)))
    with publishing(remote, MADE_FROM, "last") as partial:
        (partial.directory / "zoo").mkdir()
        for name in ("last", "zoo/one"):
            (partial.directory / name).write_text(name)
    assert [name.removeprefix(str(target)) for name in sent] == ["/zoo/one", "/last"]
    assert (remote / "zoo" / "one").read_text() == "zoo/one"
    assert list(target.parent.iterdir()) == []
    with pytest.raises(ConfigError, match="already exists"), publishing(remote, MADE_FROM, "last"):
        raise AssertionError
    with pytest.raises(ConfigError, match="already exists"):
        refuse_existing(remote)


def test_a_failed_upload_goes_on_where_it_was(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, sent = locate(f"memory:/{target}"), []
    put = type(remote.fs).put_file

    def unsteady(fs: object, here: str, there: str) -> None:
        sent.append(Path(there).name)
        if len(sent) == 2:
            raise ConnectionError("the line is down")
        put(fs, here, there)

    def make() -> None:
        with publishing(remote, MADE_FROM, "last") as partial:
            for name in ("a", "b", "last"):
                if partial.finished(name) is None:
                    (partial.directory / name).write_text(name)
                    partial.finish(name, {})

    monkeypatch.setattr(type(remote.fs), "put_file", unsteady)
    with pytest.raises(EnvironmentProblem, match="the line is down"):
        make()
    assert not (remote / "last").exists()
    refuse_existing(remote)  # what lies there is the part that was sent
    other = pytest.raises(ConfigError, match="another upload to this target was cut off")
    with other, publishing(remote, {"other": 1}, "last"):
        raise AssertionError
    make()
    assert sent == ["a", "b", "b", "last"]
    assert {path.name for path in remote.iterdir()} == {"a", "b", "last"}
    assert list(target.parent.iterdir()) == []


def test_a_staging_directory_of_another_user_is_not_used(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    foreign = pytest.raises(ConfigError, match="belongs to another user")
    with foreign, publishing(locate(f"memory:/{target}"), MADE_FROM, "last"):
        raise AssertionError

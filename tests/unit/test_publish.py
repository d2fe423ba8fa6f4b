"""A directory appears complete or not at all, and its making goes on after a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_octo import publish
from megatron_octo.errors import ConfigError, EnvironmentProblem
from megatron_octo.files import hold
from megatron_octo.locations import Location, locate
from megatron_octo.publish import publishing, refuse_existing, tidy

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


@pytest.fixture
def remote(target: Path) -> Location:
    return locate(f"memory:/{target}")


@pytest.fixture
def sent(remote: Location, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were uploaded, in their order."""
    sent, put = [], type(remote.fs).put_file
    monkeypatch.setattr(type(remote.fs), "put_file", lambda fs, *names: (sent.append(names[1]), put(fs, *names)))
    return sent


def _workspace(target: Location) -> Path:
    return publish._workspace(target)


def _make(target: Location, made_from: dict | None = None, error: BaseException | None = None) -> list[str]:
    """Make a directory of three files; what was finished before. With an error it ends before the last one."""
    with publishing(target, made_from or MADE_FROM, "last") as partial:
        kept = [name for name in ("a", "b") if partial.finished(name) is not None]
        for name in {"a", "b"} - set(kept):
            (partial.directory / name).write_text(name)
            partial.finish(name, {})
        if error:
            raise error
        (partial.directory / "last").write_text("last")
    return kept


def _fail_at(remote: Location, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[[], None]) -> None:
    """Upload all but one file, for which something else happens, once."""
    put, failed = type(remote.fs).put_file, []

    def unsteady(fs: object, here: str, there: str) -> None:
        if Path(there).name == name and not failed:
            failed.append(name)
            fault()
        else:
            put(fs, here, there)

    monkeypatch.setattr(type(remote.fs), "put_file", unsteady)


def _cut_off() -> None:
    raise ConnectionError("the line is down")


def _names(remote: Location) -> set[str]:
    return {path.name for path in remote.iterdir()}


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


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError(errno.ENOSPC, "full"), ConfigError("mistake")])
def test_an_error_leaves_nothing(target: Path, error: Exception) -> None:
    with pytest.raises(type(error)), publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "one").touch()
        partial.finish("one", {})
        raise error
    assert list(target.parent.iterdir()) == []


def test_finished_files_outlive_a_failure_of_the_network(target: Path) -> None:
    problem = EnvironmentProblem("s3 did not answer")
    with pytest.raises(EnvironmentProblem):
        _make(target, error=problem)
    assert _make(target) == ["a", "b"]
    with pytest.raises(EnvironmentProblem), publishing(target.with_name("other"), MADE_FROM, "last"):
        raise problem  # nothing was finished, so there is nothing to keep
    assert list(target.parent.iterdir()) == [target]


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
        assert list(partial.directory.iterdir()) == []
        (partial.directory / "last").touch()


@pytest.mark.parametrize("what", ["__version__", "_FORMAT"])
def test_other_code_starts_over(target: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    _interrupted(target)
    monkeypatch.setattr(publish, what, "another")
    assert _make(target) == []
    assert sorted(path.name for path in target.iterdir()) == ["a", "b", "last"]


def test_a_finished_file_that_changed_its_size_is_made_again(target: Path) -> None:
    _interrupted(target)
    left = target.parent / ".model.partial" / "files"
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


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_lock_of_a_directory_that_went_away_does_not_count(
    target: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its last holder removes it before or after this process opened the file."""
    stolen = []

    def late(directory: Path) -> object:
        if not stolen and when == "before":
            stolen.append(directory.rmdir())
            raise FileNotFoundError(directory / ".lock")
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
    files = _workspace(target) / "files"
    assert {path for path, appeared in flushed if not appeared} == {
        files, files / "deep", files / "deep" / "one", files / "last",
    }  # fmt: skip
    assert flushed[-1] == (target.parent, True)


def test_it_is_held_and_may_be_gone_on_with_until_it_appeared(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making gigabytes durable takes its time: another process may come, or this one may be killed."""

    def killed(path: Path) -> None:
        with pytest.raises(ConfigError, match=f"process {os.getpid()} is making it"):
            _make(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "flush_to_disk", killed)
        _make(target)
    assert not target.exists()
    assert _make(target) == ["a", "b"]
    assert sorted(path.name for path in target.iterdir()) == ["a", "b", "last"]


def test_a_remote_directory_gets_its_last_file_at_the_end(target: Path, remote: Location, sent: list[str]) -> None:
    with publishing(remote, MADE_FROM, "last") as partial:
        (partial.directory / "zoo").mkdir()
        for name in ("last", "zoo/one"):
            (partial.directory / name).write_text(name)
    assert [name.removeprefix(str(target)) for name in sent] == ["/zoo/one", "/last"]
    assert (remote / "zoo" / "one").read_text() == "zoo/one"
    assert list(target.parent.iterdir()) == []
    with pytest.raises(ConfigError, match="already exists"):
        _make(remote)
    with pytest.raises(ConfigError, match="already exists"):
        refuse_existing(remote)


def test_a_failed_upload_goes_on_where_it_was(
    target: Path, remote: Location, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(remote, monkeypatch, "b", _cut_off)
    with pytest.raises(EnvironmentProblem, match="the line is down"):
        _make(remote)
    assert _names(remote) == {"a"}
    refuse_existing(remote)  # what lies there is the part that was sent
    with pytest.raises(ConfigError, match="another upload to this target was cut off"):
        _make(remote, {"other": 1})
    assert _make(remote) == ["a", "b"]
    assert [Path(name).name for name in sent] == ["a", "b", "last"]
    assert _names(remote) == {"a", "b", "last"}
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_text("more")])
def test_what_went_away_from_the_remote_is_sent_again(
    remote: Location, monkeypatch: pytest.MonkeyPatch, change: Callable[[Location], None]
) -> None:
    _fail_at(remote, monkeypatch, "b", _cut_off)
    with pytest.raises(EnvironmentProblem, match="the line is down"):
        _make(remote)
    fs, listed = type(remote.fs), {}  # as object stores do, it remembers what it was told before
    info = fs.info
    monkeypatch.setattr(fs, "info", lambda self, path: listed.get(path) or listed.setdefault(path, info(self, path)))
    monkeypatch.setattr(fs, "invalidate_cache", lambda self, path=None: listed.clear())
    assert (remote / "a").stat().st_size == 1
    change(remote / "a")
    _make(remote)
    assert {path.name: path.read_text() for path in remote.iterdir()} == {"a": "a", "b": "b", "last": "last"}


def test_what_is_made_anew_is_sent_anew(remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(text: str) -> None:
        with publishing(remote, MADE_FROM, "last") as partial:
            for name in ("a", "b", "last"):
                (partial.directory / name).write_text(text)

    _fail_at(remote, monkeypatch, "b", _cut_off)
    with pytest.raises(EnvironmentProblem, match="the line is down"):
        make("1")
    make("2")
    assert (remote / "a").read_text() == "2"


def test_the_last_file_is_sent_only_when_all_others_arrived(remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_at(remote, monkeypatch, "b", lambda: None)
    with pytest.raises(EnvironmentProblem, match="b did not arrive"):
        _make(remote)
    assert _names(remote) == {"a"}
    _make(remote)
    assert _names(remote) == {"a", "b", "last"}


def test_an_error_while_an_upload_is_gone_on_with_does_not_lock_the_target(
    remote: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there is known as ours by the journal alone."""
    _fail_at(remote, monkeypatch, "b", _cut_off)
    with pytest.raises(EnvironmentProblem, match="the line is down"):
        _make(remote)
    with pytest.raises(OSError, match="the source is not readable"):
        _make(remote, error=OSError("the source is not readable"))
    assert _make(remote) == ["a", "b"]
    assert _names(remote) == {"a", "b", "last"}


def test_what_a_kill_left_of_a_complete_upload_goes(
    target: Path, remote: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "_remove", lambda workspace: exec("raise KeyboardInterrupt"))
        _make(remote)
    assert _names(remote) == {"a", "b", "last"} and _workspace(remote).is_dir()
    tidy(remote)
    tidy(remote)
    assert list(target.parent.iterdir()) == []


def test_what_a_process_is_making_is_not_tidied_away(target: Path) -> None:
    with publishing(target, MADE_FROM, "last") as partial:
        (partial.directory / "last").touch()
        tidy(target)
    assert [path.name for path in target.iterdir()] == ["last"]


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_link_in_the_place_of_the_workspace_is_not_followed(target: Path, remote: Location, kind: str) -> None:
    (elsewhere := target.parent / "elsewhere").mkdir()
    (elsewhere / "thesis").touch()
    _workspace(wanted := target if kind == "local" else remote).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="a link or a file"):
        _make(wanted)
    assert [path.name for path in elsewhere.iterdir()] == ["thesis"]


@pytest.mark.parametrize("names", [["thesis"], ["files"], ["files", "journal.json"]])
def test_a_directory_of_the_users_own_is_not_emptied(target: Path, names: list[str]) -> None:
    (own := _workspace(target)).mkdir()
    for name in names:
        (own / name).write_text("[]")
    with pytest.raises(ConfigError, match="of another making"):
        _make(target)
    tidy(target)
    assert sorted(path.name for path in own.iterdir()) == names


def test_a_staging_directory_of_another_user_is_not_used(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    foreign = pytest.raises(ConfigError, match="belongs to another user")
    with foreign, publishing(locate(f"memory:/{target}"), MADE_FROM, "last"):
        raise AssertionError


@pytest.mark.parametrize("voucher", ["seal.json", "certificate.json"])
def test_nothing_is_made_inside_what_is_sealed(tmp_path, voucher):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / voucher).write_text("{}")
    with pytest.raises(ConfigError, match=f"{voucher} vouches for"):
        refuse_existing(tmp_path / "checkpoint" / "sub" / "hf")

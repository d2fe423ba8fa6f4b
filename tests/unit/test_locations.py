"""Paths and URLs are spoken of alike, and what cannot be reached is said in words."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem
from megatron_octo.locations import is_remote, local_copy, locate, reaching, read_range


def test_paths_and_urls_are_told_apart(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path
    assert locate(f"file://{tmp_path}") == tmp_path
    remote = locate("memory://bucket/model")
    assert str(remote / "config.json") == "memory://bucket/model/config.json"
    assert locate("http://host/model/").name == remote.name == "model"
    assert is_remote(remote)
    assert not is_remote(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("", "empty path"), ("nothing://x", "no protocol fsspec knows")])
def test_what_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        locate(text)


@pytest.mark.parametrize(
    ("url", "fix"), [("s3://b/m", r"pip install 'megatron_octo\[s3\]'"), ("gs://b/m", "gcsfs"), ("sftp://h/m", "Say")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, fix: str) -> None:
    def absent(protocol: str) -> None:
        raise ImportError("Say what")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ConfigError, match=fix):
        locate(url)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_ranges_are_read_and_a_short_file_is_an_error(tmp_path: Path, where: str) -> None:
    directory = tmp_path if where == "local" else locate(f"memory:/{tmp_path}/ranges")
    file = directory / "numbers"
    file.write_bytes(bytes(range(100)))
    out = bytearray(7)
    read_range(file, 90, memoryview(out))
    assert out == bytes(range(90, 97))
    read_range(file, 100, memoryview(bytearray()))
    with pytest.raises(DataError, match=r"numbers: ends at byte 100 of 102"):
        read_range(file, 95, memoryview(out))
    with pytest.raises(FileNotFoundError):
        read_range(directory / "nothing", 0, memoryview(out))


def test_a_range_is_read_whole_though_the_system_gives_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Reluctant(io.BytesIO):
        def readinto(self, buffer: memoryview) -> int:
            return super().readinto(buffer[:3])

    monkeypatch.setattr(Path, "open", lambda *_, **__: Reluctant(bytes(range(20))))
    out = bytearray(10)
    read_range(tmp_path / "file", 5, memoryview(out))
    assert out == bytes(range(5, 15))


def test_a_local_copy_of_a_url_is_gone_afterwards(tmp_path: Path) -> None:
    remote = locate(f"memory:/{tmp_path}/model")
    (remote / "tokenizer.json").write_text("{}")
    with local_copy(remote, ["tokenizer.json", "merges.txt"]) as here:
        assert [path.name for path in here.iterdir()] == ["tokenizer.json"]
        assert (here / "tokenizer.json").read_text() == "{}"
    assert not here.exists()
    with local_copy(tmp_path, ["anything"]) as here:
        assert here == tmp_path
    assert tmp_path.is_dir()


def test_only_a_remote_failure_is_put_in_words(tmp_path: Path) -> None:
    remote = locate("memory://bucket/model")
    message = r"memory://bucket/model: cannot be reached \(RuntimeError: no route\)"
    with pytest.raises(EnvironmentProblem, match=message), reaching(remote):
        raise RuntimeError("no\nroute")
    for error, location in ((FileNotFoundError(), remote), (DataError("x"), remote), (RuntimeError(), tmp_path)):
        with pytest.raises(type(error)), reaching(location):
            raise error

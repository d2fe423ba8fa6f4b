"""Directories that appear complete or not at all, and whose making goes on after a kill.

A directory is made under a hidden name beside its target, with a journal of the files that are finished. A command
that was killed finds them there when it is given again. A remote target is made on this machine and then uploaded,
the file that vouches for the others last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_octo.errors import ConfigError
from megatron_octo.files import LOCK, flush_to_disk, hash_json, hold, read_json, write_json
from megatron_octo.locations import Location, is_remote, reaching

_JOURNAL = ".journal.json"


class Partial:
    """A directory in the making. Whatever lies in it and was not finished is removed when it is taken up.

    Args:
        directory: exists; this process alone writes to it.
        made_from: JSON values that decide what the files will hold. What was finished is kept only for the same.

    Raises:
        ConfigError: it waits for the rest of its upload, and was made from something else.
    """

    def __init__(self, directory: Path, made_from: dict[str, Any]) -> None:
        self.directory = directory
        """Where to write, always on this machine."""
        known = read_json(directory / _JOURNAL)
        same = isinstance(known, dict) and hash_json(known.get("made_from")) == hash_json(made_from)
        if known and not same and known["uploaded"] is not None:
            raise ConfigError(
                f"{directory}: another upload to this target was cut off", "it is gone on with or given up",
                "give that command again, or remove this directory",
            )  # fmt: skip
        self._journal = known if same else {"made_from": made_from, "finished": {}, "uploaded": None}
        for path in sorted(directory.rglob("*"), reverse=True):
            name = path.relative_to(directory).as_posix()
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in (LOCK, _JOURNAL) and self.finished(name) is None:
                path.unlink()
        self._write()

    def finished(self, name: str) -> dict[str, Any] | None:
        """What was noted of a file when it was finished, None if it was not; `name` is relative to the directory."""
        entry, path = self._journal["finished"].get(name), self.directory / name
        if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
            return None
        return entry["facts"]

    def finish(self, name: str, facts: dict[str, Any]) -> None:
        """Note that a file is complete and durable, so that it is never made again.

        Args:
            name: relative to the directory.
            facts: JSON values that whoever goes on will need.
        """
        size = (self.directory / name).stat().st_size
        self._journal["finished"][name] = {"bytes": size, "facts": facts}
        self._write()

    @property
    def uploads(self) -> bool:
        """Whether it was complete before and its upload was begun: what lies at a remote target is ours."""
        return self._journal["uploaded"] is not None

    def upload(self, target: Location, last: str) -> None:
        """Copy all files to a remote target, those left over from an upload that was cut off.

        Args:
            target: a remote directory.
            last: the file that is copied when all others are there.

        Raises:
            EnvironmentProblem: the target cannot be reached; the same command goes on.
        """
        done = [name for name in self._journal["uploaded"] or () if self.finished(name) is not None]
        for name in sorted(set(self.files()) - set(done), key=lambda name: (name == last, name)):
            self._journal["uploaded"] = done
            self._write()
            with reaching(target):
                there = target / name
                there.fs.put_file(str(self.directory / name), there.path)
            done.append(name)

    def files(self) -> list[str]:
        """Names of all files it will consist of, as they are now."""
        paths = (path for path in self.directory.rglob("*") if path.is_file())
        names = (path.relative_to(self.directory).as_posix() for path in paths)
        return [name for name in names if name not in (LOCK, _JOURNAL)]

    def _write(self) -> None:
        write_json(self.directory / _JOURNAL, self._journal)


@contextmanager
def publishing(target: Location, made_from: dict[str, Any], last: str) -> Iterator[Partial]:
    """Make a directory that appears under its name only when it is complete.

    After an error nothing is left of it. After a kill or an interrupt the finished files stay and serve the next
    attempt that is made from the same, as does a complete directory whose upload failed.

    Args:
        target: must not exist. A local one appears by a rename, durable; a remote one has `last` only when it is whole.
        made_from: JSON values that decide what the files will hold, e.g. the hashes of what is read.
        last: the file that vouches for all others.

    Yields:
        Where to write, and what is there already.

    Raises:
        ConfigError: the target exists, or another process is making it.
        EnvironmentProblem: a remote target cannot be reached.
        ValueError: the directory was made without the file `last`.
    """
    directory = _staging(target)
    with _claim(directory, target):
        partial = Partial(directory, made_from)
        try:
            if not partial.uploads:
                _refuse(target)
            yield partial
            if not (directory / last).is_file():
                raise ValueError(f"{target}: made without {last}")
            if not is_remote(target):
                _appear(directory, target)
        except Exception:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        if is_remote(target):
            partial.upload(target, last)
            shutil.rmtree(directory)


def refuse_existing(target: Location) -> None:
    """Refuse to write over anything, before work is done that `publishing` would refuse in the end.

    Raises:
        ConfigError: the target exists, and is not an upload that was cut off and may go on.
        EnvironmentProblem: a remote target cannot be reached.
    """
    journal = read_json(_staging(target) / _JOURNAL) if is_remote(target) else None
    if not journal or journal["uploaded"] is None:
        _refuse(target)


def _refuse(target: Location) -> None:
    with reaching(target):
        exists = target.exists() or target.is_symlink()
    if exists:
        raise ConfigError(f"{target}: already exists", "a conversion never writes over another", "name another target")


def _staging(target: Location) -> Path:
    """The directory on this machine in which a target is made, the same one each time."""
    if not is_remote(target):
        return target.parent / f".{target.name}.partial"
    address = hashlib.sha256(str(target).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"octo-{os.getuid()}-{address}.partial"


def _claim(directory: Path, target: Location) -> IO[str]:
    """Hold the directory; one that its last holder published or removed while this process waited does not count."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700 if is_remote(target) else 0o777, exist_ok=True)
    if is_remote(target) and directory.stat().st_uid != os.getuid():
        raise ConfigError(f"{directory}: belongs to another user", fix="set TMPDIR to a directory of your own")
    while True:
        try:
            lock = hold(directory)
        except BlockingIOError as error:
            raise ConfigError(
                f"{target}: process {error.strerror} is making it", "one process makes a directory", "wait for it"
            ) from None
        if (directory / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), (directory / LOCK).stat()):
            return lock
        lock.close()


def _appear(directory: Path, target: Path) -> None:
    for name in (_JOURNAL, LOCK):
        (directory / name).unlink()
    for path in directory.rglob("*"):
        flush_to_disk(path)
    flush_to_disk(directory)
    _refuse(target)
    directory.rename(target)
    flush_to_disk(target.parent)

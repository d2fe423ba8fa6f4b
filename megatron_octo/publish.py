"""Directories that appear complete or not at all, and whose making goes on after a kill.

A target is made in a workspace, a hidden directory beside it: its files in a folder of their own, which is the one
thing that is renamed, and next to them a journal of the finished ones and the lock of the process at work. A command
that was killed finds them there when it is given again. A remote target is made in a workspace on this machine and
then uploaded, the file that vouches for the others last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_octo import __version__
from megatron_octo.errors import ConfigError, EnvironmentProblem
from megatron_octo.files import LOCK, flush_to_disk, hash_json, hold, read_json, write_json
from megatron_octo.locations import Location, is_remote, reaching

_FILES = "files"
_JOURNAL = "journal.json"
_VOUCHERS = ("seal.json", "certificate.json")
_FORMAT = 1
"""Raised when the same origin comes to give other files: those of the code before must not stand among them."""


class Partial:
    """A directory in the making. Whatever lies in it and was not finished is removed when it is taken up.

    Args:
        workspace: exists; this process alone writes to it.
        made_from: JSON values that decide what the files will hold. What was finished is kept only for the same, and
            only by the same version of this program.

    Raises:
        ConfigError: it waits for the rest of its upload, and was made from something else.
    """

    def __init__(self, workspace: Path, made_from: dict[str, Any]) -> None:
        self.directory = workspace / _FILES
        """Where to write, always on this machine."""
        self._workspace = workspace
        origin = {"version": __version__, "format": _FORMAT, "made_from": made_from}
        known = _journal(workspace)
        same = known is not None and hash_json(known["origin"]) == hash_json(origin)
        if known and not same and known["uploaded"] is not None:
            raise ConfigError(
                f"{workspace}: another upload to this target was cut off", "it is gone on with or given up",
                "give that command again, or remove this directory",
            )  # fmt: skip
        self._noted = known if same else {"origin": origin, "finished": {}, "uploaded": None}
        self._write()
        self.directory.mkdir(exist_ok=True)
        for path in sorted(self.directory.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif self.finished(path.relative_to(self.directory).as_posix()) is None:
                path.unlink()

    def finished(self, name: str) -> dict[str, Any] | None:
        """What was noted of a file when it was finished, None if it was not; `name` is relative to the directory."""
        entry, path = self._noted["finished"].get(name), self.directory / name
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
        self._noted["finished"][name] = {"bytes": size, "facts": facts}
        self._write()

    @property
    def uploads(self) -> bool:
        """Whether it was complete before and its upload was begun: what lies at a remote target is ours."""
        return self._noted["uploaded"] is not None

    def survives(self, error: Exception) -> bool:
        """Whether the same command, given again after an error, has something here to go on with.

        What lies at a remote target is known as ours only from here. Finished files of a target that is not uploaded
        yet stay when it was the machine or the network that failed: that passes.
        """
        return self.uploads or (isinstance(error, EnvironmentProblem) and bool(self._noted["finished"]))

    def upload(self, target: Location, last: str) -> None:
        """Copy all files to a remote target, those that an upload that was cut off has not left there.

        Args:
            target: a remote directory.
            last: the file that is copied when all others are there.

        Raises:
            EnvironmentProblem: the target cannot be reached, or lost a file; the same command goes on.
        """
        # A file that is made anew at every attempt may differ in more than its size: it is sent anew too.
        sent = [name for name in self._noted["uploaded"] or () if self.finished(name) is not None]
        sizes = {name: (self.directory / name).stat().st_size for name in self.files()}
        self._note_sent(sent)
        with reaching(target):
            for name in sorted(sizes, key=lambda name: (name == last, name)):
                there = target / name
                if name == last:
                    self._require_arrived(target, {other: size for other, size in sizes.items() if other != last})
                elif name in sent and _size(there) == sizes[name]:
                    continue
                there.fs.put_file(str(self.directory / name), there.path)
                self._note_sent(sent := [*sent, name])

    def files(self) -> list[str]:
        """Names of all files it will consist of, as they are now."""
        paths = (path for path in self.directory.rglob("*") if path.is_file())
        return [path.relative_to(self.directory).as_posix() for path in paths]

    def _note_sent(self, names: list[str]) -> None:
        self._noted["uploaded"] = names
        self._write()

    def _require_arrived(self, target: Location, sizes: dict[str, int]) -> None:
        lacking = [name for name, size in sizes.items() if _size(target / name) != size]
        if lacking:
            raise EnvironmentProblem(
                f"{target}: {', '.join(lacking)} did not arrive, or went away again",
                "a model is complete there or not marked as such", "give the same command again",
            )  # fmt: skip

    def _write(self) -> None:
        write_json(self._workspace / _JOURNAL, self._noted)


@contextmanager
def publishing(target: Location, made_from: dict[str, Any], last: str) -> Iterator[Partial]:
    """Make a directory that appears under its name only when it is complete.

    After an error nothing is left of it, but for what `Partial.survives` names. After a kill or an interrupt the
    finished files stay and serve the next attempt that is made from the same.

    Args:
        target: must not exist. A local one appears by a rename, durable; a remote one has `last` only when it is whole.
        made_from: JSON values that decide what the files will hold, e.g. the hashes of what is read.
        last: the file that vouches for all others.

    Yields:
        Where to write, and what is there already.

    Raises:
        ConfigError: the target exists, another process is making it, or the name of its workspace is taken.
        EnvironmentProblem: a remote target cannot be reached.
        ValueError: the directory was made without the file `last`.
    """
    workspace = _workspace(target)
    with _claim(workspace, target):
        partial = Partial(workspace, made_from)
        try:
            if not partial.uploads:
                _refuse(target)
            yield partial
            if not (partial.directory / last).is_file():
                raise ValueError(f"{target}: made without {last}")
            if is_remote(target):
                partial.upload(target, last)
            else:
                _appear(partial.directory, target)
        except Exception as error:
            if not partial.survives(error):
                _remove(workspace)
            raise
        _remove(workspace)


def refuse_existing(target: Location) -> None:
    """Refuse to write over anything, before work is done that `publishing` would refuse in the end.

    Raises:
        ConfigError: the target exists, and is not an upload that was cut off and may go on.
        EnvironmentProblem: a remote target cannot be reached.
    """
    above = [] if is_remote(target) else target.absolute().parents
    sealed = [place / name for place in above for name in _VOUCHERS if (place / name).is_file()]
    if sealed:
        raise ConfigError(
            f"{target}: lies in what {sealed[0]} vouches for",
            "a sealed directory holds what it was sealed with and no more", "name a target beside it",
        )  # fmt: skip
    journal = _journal(_workspace(target)) if is_remote(target) else None
    if not journal or journal["uploaded"] is None:
        _refuse(target)


def tidy(target: Location) -> None:
    """Remove what a kill left of the making of a target that is complete, unless a process is at work there."""
    workspace = _workspace(target)
    if workspace.is_dir():
        with suppress(ConfigError), _claim(workspace, target):
            _remove(workspace)


def _refuse(target: Location) -> None:
    with reaching(target):
        exists = target.exists() or target.is_symlink()
    if exists:
        raise ConfigError(f"{target}: already exists", "a conversion never writes over another", "name another target")


def _workspace(target: Location) -> Path:
    """The directory on this machine in which a target is made, the same one each time."""
    if not is_remote(target):
        return target.parent / f".{target.name}.partial"
    address = hashlib.sha256(str(target).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"octo-{os.getuid()}-{address}.partial"


def _journal(workspace: Path) -> dict[str, Any] | None:
    """The journal, None where there is none of ours."""
    journal = read_json(workspace / _JOURNAL)
    return journal if isinstance(journal, dict) and {"origin", "finished", "uploaded"} <= journal.keys() else None


def _claim(workspace: Path, target: Location) -> IO[str]:
    """Hold the workspace; one that its last holder removed while this process waited does not count."""
    workspace.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            workspace.mkdir(mode=0o700 if is_remote(target) else 0o777)
        try:
            _require_own_directory(workspace, target)
            lock = hold(workspace)
            if (workspace / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), (workspace / LOCK).stat()):
                break
            lock.close()
        except FileNotFoundError:
            continue
        except BlockingIOError as error:
            raise ConfigError(
                f"{target}: process {error.strerror} is making it", "one process makes a directory", "wait for it"
            ) from None
    ours = {LOCK, *(path.name for path in workspace.glob(f".{_JOURNAL}.*.tmp"))}
    ours |= {_JOURNAL, _FILES} if _journal(workspace) else set()
    if others := {path.name for path in workspace.iterdir()} - ours:
        with lock:
            (workspace / LOCK).unlink()
        raise ConfigError(
            f"{workspace}: holds {', '.join(sorted(others))}, of another making",
            f"{target.name} is made there, and what lies there would be removed", "move that directory away",
        )  # fmt: skip
    return lock


def _require_own_directory(workspace: Path, target: Location) -> None:
    """The place for remote targets is open to all users: one may have put a directory or a link of theirs there."""
    found = workspace.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{workspace}: a link or a file", f"{target.name} is made there", "remove it")
    if is_remote(target) and found.st_uid != os.getuid():
        raise ConfigError(f"{workspace}: belongs to another user", fix="set TMPDIR to a directory of your own")


def _appear(directory: Path, target: Path) -> None:
    for path in directory.rglob("*"):
        flush_to_disk(path)
    flush_to_disk(directory)
    _refuse(target)
    directory.rename(target)
    flush_to_disk(target.parent)


def _remove(workspace: Path) -> None:
    """Give up a workspace that this process holds: the lock goes last, and then it may be another's."""
    shutil.rmtree(workspace / _FILES, ignore_errors=True)
    with suppress(OSError):
        for name in (_JOURNAL, LOCK):
            (workspace / name).unlink(missing_ok=True)
        workspace.rmdir()


def _size(there: Location) -> int | None:
    """Bytes of a remote file as it is now, whatever was listed before; None where there is none."""
    there.fs.invalidate_cache()
    try:
        return there.stat().st_size
    except FileNotFoundError:
        return None

"""Files that are there completely or not at all, their hashes, and one writer to a directory."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from blake3 import blake3

from megatron_octo.errors import EnvironmentProblem, machine_problem
from megatron_octo.locations import reaching

if TYPE_CHECKING:
    from megatron_octo.locations import Location

LOCK = ".lock"
"""File of a directory that its one writer holds, or several that share it; its text tells the last to take it."""

_LEFT = re.compile(r"\.[0-9a-f]{12}\.(tmp|partial)$")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_CHUNK = 1 << 20
_WRITE = 1 << 16


def hash_file(path: Location) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_weights(path: Location) -> str:
    """BLAKE3 of a file, hexadecimal: for files of gigabytes, where SHA-256 would take three times as long.

    Args:
        path: a local or a remote file.

    Raises:
        EnvironmentProblem: a remote file cannot be reached.
        OSError: a local file cannot be read.
    """
    digest = blake3()
    memory = memoryview(bytearray(_CHUNK))
    with reaching(path), path.open("rb", buffering=0) if isinstance(path, Path) else path.open("rb") as file:
        while count := file.readinto(memory):
            digest.update(memory[:count])
    return digest.hexdigest()


def hash_directory(directory: Path) -> str:
    """SHA-256 over the names and contents of a directory's files, hexadecimal."""
    return hash_files(directory.iterdir())


def hash_files(paths: Iterable[Path]) -> str:
    """The same over files of one directory that are chosen; their order does not matter."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value made of JSON's types, hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class SmallWrites(io.FileIO):
    """A file of gigabytes that takes at most 64 KiB at a time; wrap it in `io.BufferedWriter`.

    The kernel caches a large write in large pieces of memory. On a virtual machine that gives free memory back to its
    host each of them is fetched anew: 2 GiB cost 5.4 CPU seconds in writes of 64 MiB, and 0.6 in writes of 64 KiB.
    """

    def write(self, content: Any) -> int:
        """Write the beginning of some bytes; returns how many."""
        return super().write(memoryview(content).cast("B")[:_WRITE])


def flush_to_disk(path: Path) -> None:
    """Make a written file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory, and what is missing above it, so that its name survives a power cut."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        with suppress(PermissionError):  # names may be added to some directories that cannot be read
            flush_to_disk(one.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step; a reader or a crash sees the old content or the new, never a part.

    When this returns the file survives a power cut. Its directory is made if missing. Several processes may write the
    same file, each through a name of its own; what a killed one leaves is a file named `.<name>.<any>.tmp`.
    """
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_to_disk(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a large file under; it gets its own when the block ends without an error.

    Several processes may replace the same file, each through a name of its own. Flushing is up to the caller.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(directory: Path) -> list[Path]:
    """Files below a directory that `write_bytes` and `replacing` had no time to give their names: of killed processes.

    Only where nobody else writes there; what one who does is about to name looks the same.
    """
    return [path for path in directory.rglob(".*") if _LEFT.search(path.name) and path.is_file()]


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people and machines, completely or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None where it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in words that the file a user asked for cannot be written.

    Raises:
        EnvironmentProblem: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        error.filename = str(path)  # not the temporary name
        raise machine_problem(error) or EnvironmentProblem(
            f"{path}: cannot be written ({(error.strerror or str(error)).lower()})", fix="name another --out"
        ) from None


def hold(directory: Path, patience: float = 0.0, shared: bool = False) -> IO[str]:
    """Claim a directory for this process; the kernel lets go when the process ends, however it ends.

    Args:
        directory: made if missing.
        patience: seconds to wait for another holder to let go.
        shared: others that share it may hold it at the same time; who wants it alone does not get it meanwhile.

    Returns:
        The open lock file: a context manager; keep it open as long as the directory is written to.

    Raises:
        BlockingIOError: another process holds it; the error's `strerror` is that process's id, or tells which was
            the last of several, which may have ended.
        EnvironmentProblem: its file system has no locks.
        OSError: the directory cannot be written.
    """
    make_directory(directory)
    lock = (directory / LOCK).open("a+", encoding="utf-8")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                lock.seek(0)
                with lock:
                    raise BlockingIOError(error.errno, lock.read().strip() or "unknown") from None
            time.sleep(0.1)
        except OSError as error:
            lock.close()
            if error.errno not in _NO_LOCKS:
                raise
            raise EnvironmentProblem(
                f"{directory}: its file system gives no locks ({os.strerror(error.errno).lower()})",
                "a lock keeps a second process from writing there",
                "have it mounted with locks (Lustre: -o flock; NFS: a running lockd), or name another place",
            ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}, the last of those that share it" if shared else str(os.getpid()))
    lock.flush()
    return lock


def is_held(directory: Path) -> bool:
    """Whether a process holds a directory alone now; those that share it do not count. Changes nothing."""
    try:
        with (directory / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

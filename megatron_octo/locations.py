"""Where files lie: a path on this machine, or a URL that fsspec reads and writes, with one way to speak of both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem, OctoError, machine_problem

if TYPE_CHECKING:
    from upath import UPath

Given = ParamSpec("Given")
Result = TypeVar("Result")

Location: TypeAlias = "Path | UPath"
"""Readers use only what both have: `/`, `is_file`, `is_dir`, `open("rb")`, `read_text`, `iterdir`, `glob`, `name`,
`parent` and `stat().st_size`."""

_PACKAGES = {"s3": "'megatron_octo[s3]'", "s3a": "'megatron_octo[s3]'", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


def locate(text: str) -> Location:
    """Understand what a user names.

    Args:
        text: a path, or a URL such as `s3://bucket/model`.

    Returns:
        A `Path` for a path and for `file://`, else a `UPath`. Nothing is looked up yet.

    Raises:
        ConfigError: nothing is named, no such protocol, or the package that speaks it is not installed.
    """
    if not text:
        raise ConfigError("an empty path", fix="name a directory or a URL")
    protocol, mark, rest = text.partition("://")
    if not mark:
        return Path(text).expanduser()  # a shell leaves the ~ of --out=~/there alone
    if protocol == "file":
        return Path(rest)
    from fsspec import get_filesystem_class
    from upath import UPath

    try:
        get_filesystem_class(protocol)
        return UPath(f"{protocol}://{rest.rstrip('/')}")
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else f"install what fsspec needs for it ({error})"
        raise ConfigError(f"{text}: nothing installed here speaks {protocol}://", fix=fix) from None
    except ValueError:
        raise ConfigError(f"{text}: {protocol}:// is no protocol fsspec knows", fix="use s3:// or gs://") from None


def is_remote(location: Location) -> bool:
    """Whether a location is reached over a network rather than through this machine's file system."""
    return not isinstance(location, Path)


@contextmanager
def reaching(*locations: Location) -> Iterator[None]:
    """Say in words that a remote location cannot be reached; each service has errors of its own.

    Raises:
        EnvironmentProblem: in place of any error but ours, a missing file, and what befalls this machine's own files.
    """
    try:
        yield
    except (OctoError, FileNotFoundError):
        raise
    except Exception as error:
        places = " or ".join(str(location) for location in locations if is_remote(location))
        if not places or machine_problem(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise EnvironmentProblem(
            f"{places}: cannot be reached ({reason})", fix="check the address, the network and the credentials"
        ) from None


def in_words(command: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make a command say in words that a location it was given cannot be reached, see `reaching`.

    Beneath a command files are asked for in many places; here none of them is forgotten. Places that know which of
    several locations fails still say so themselves.
    """

    @wraps(command)
    def spoken(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with reaching(*_named([*args, *kwargs.values()])):
            return command(*args, **kwargs)

    return spoken


def _named(values: Iterable[Any]) -> Iterator[Location]:
    """The remote locations among a command's arguments; they alone have a file system of their own."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _named(value)
        elif hasattr(value, "fs"):
            yield value


def read_range(location: Location, start: int, out: memoryview) -> None:
    """Fill a buffer with a file's bytes from an offset on.

    A local file is neither mapped nor buffered: the bytes go from the kernel straight to where they belong. Of a remote
    one only these bytes are fetched.

    Args:
        location: a file.
        start: offset of the first byte.
        out: bytes, writable and contiguous; all of it is filled.

    Raises:
        DataError: the file ends before.
        EnvironmentProblem: a remote file cannot be reached.
        OSError: a local file cannot be read.
    """
    done = 0
    if isinstance(location, Path):
        with location.open("rb", buffering=0) as file:
            file.seek(start)
            while done < len(out) and (count := file.readinto(out[done:])):
                done += count
    elif len(out):
        with reaching(location):
            content = location.fs.cat_file(location.path, start=start, end=start + len(out))
        done = len(content)
        out[:done] = content
    if done < len(out):
        raise DataError(f"{location}: ends at byte {start + done} of {start + len(out)}", fix="copy the file again")


@contextmanager
def local_copy(location: Location, names: Iterable[str]) -> Iterator[Path]:
    """A local directory for libraries that read no URLs.

    Args:
        location: a directory.
        names: the files that are needed; those that are not there are left out.

    Yields:
        The directory itself where it is local, else a temporary one with copies, gone afterwards.

    Raises:
        EnvironmentProblem: a remote directory cannot be reached.
    """
    if isinstance(location, Path):
        yield location
        return
    with tempfile.TemporaryDirectory(prefix="octo-") as scratch:
        with reaching(location):
            for name in names:
                if (location / name).is_file():
                    (Path(scratch) / name).write_bytes((location / name).read_bytes())
        yield Path(scratch)

"""The errors a user may meet: each names what is wrong, where, by which rule, and how to mend it.

The command line prints an `OctoError` as one line and exits with its code; everything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import resource

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_A_FILE = {errno.ENOTDIR, errno.EEXIST}
_NO_PLACE = {errno.ENAMETOOLONG}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


class OctoError(Exception):
    """A mistake or a condition the user can act on.

    Args:
        what: what is wrong and where (field or file, with its value).
        rule: why it is refused.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, rule: str = "", fix: str = "") -> None:
        self.what, self.rule, self.fix = what, rule, fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.rule:
            parts.append(self.rule)
        if self.fix:
            parts.append(f"fix: {self.fix}")
        return "; ".join(parts)


class ConfigError(OctoError):
    """A run, campaign or data file asks for something that is not allowed."""

    exit_code = 2


class DataError(OctoError):
    """An input file is missing, damaged or not what it claims to be."""

    exit_code = 3


class CheckpointError(OctoError):
    """A checkpoint is missing, unsealed, altered, or does not fit the run that asks for it."""

    exit_code = 4


class CertificateError(OctoError):
    """A converted model has no valid certificate."""

    exit_code = 5


class EnvironmentProblem(OctoError):
    """The machine lacks something: a package, a port, disk space, a GPU."""

    exit_code = 6


class StageFailed(OctoError):
    """A stage of a campaign, or a rank of a run, ended with an error of its own."""

    exit_code = 7


def machine_problem(error: Exception) -> EnvironmentProblem | None:
    """What a failed file operation means to the user; None for any other error, and where it is not theirs to mend.

    Args:
        error: as it was raised, at any depth of a command: by the system, or by a library that only quotes the
            system's number, as tokenizers and safetensors do.
    """
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(quoted[1]) if quoted else 0
    place = f"{name}: " if (name := getattr(error, "filename", None)) else ""
    if number in _FULL:
        return no_space(name, os.strerror(number).lower())
    if number in _FORBIDDEN:
        reason = os.strerror(number).lower()
        return EnvironmentProblem(f"{place}{reason}", fix="choose a place this user may read and write")
    if number in _A_FILE:
        return EnvironmentProblem(f"{place}a file stands where a directory is needed", fix="name another place")
    if number == errno.EISDIR:
        return EnvironmentProblem(f"{place}is a directory, and a file is needed", fix="name another place")
    if number in _TOO_MANY:
        return EnvironmentProblem(f"{place}{os.strerror(number).lower()}", *_open_files(number))
    if number in _NO_PLACE:
        reason = os.strerror(number).lower()
        return EnvironmentProblem(f"{place[:200]}{reason}", fix="give it a shorter name")
    return None


def _open_files(number: int) -> tuple[str, str]:
    """Which limit is reached, and how it is raised."""
    if number == errno.ENFILE:
        return "it is the limit of all processes of this machine together", "raise it with `sysctl fs.file-max`"
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"one process may have {most} open at once here", "raise it with `ulimit -n 65536`, and start again"


def no_space(place: object = None, reason: str = "no space left on device") -> EnvironmentProblem:
    """A full disk, a quota or a limit; `place` is a path there where one is known."""
    return EnvironmentProblem(
        f"{place}: {reason}" if place else reason,
        "what was finished before is untouched",
        "make room, then run the same command again",
    )

"""The errors a user may meet: each names what is wrong, where, by which rule, and how to mend it.

The command line prints an `OctoError` as one line and exits with its code; everything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import errno

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_A_FILE = {errno.ENOTDIR, errno.EEXIST}


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


def machine_problem(error: OSError) -> EnvironmentProblem | None:
    """What a failed file operation means to the user; None where it is not theirs to mend.

    Args:
        error: as the system raised it, from any depth of a command.
    """
    place = f"{error.filename}: " if error.filename else ""
    reason = (error.strerror or str(error)).lower()
    if error.errno in _FULL:
        return no_space(error.filename)
    if error.errno in _FORBIDDEN:
        return EnvironmentProblem(f"{place}{reason}", fix="choose a place this user may read and write")
    if error.errno in _A_FILE:
        return EnvironmentProblem(f"{place}a file stands where a directory is needed", fix="name another place")
    if error.errno == errno.EISDIR:
        return EnvironmentProblem(f"{place}is a directory, and a file is needed", fix="name another place")
    return None


def no_space(place: object = None) -> EnvironmentProblem:
    """A full disk; `place` is a path on it where one is known."""
    return EnvironmentProblem(
        f"{place}: no space left on the disk" if place else "no space left on the disk",
        "what was finished before is untouched",
        "free some, then run the same command again",
    )

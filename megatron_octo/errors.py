"""The errors a user may meet: each names what is wrong, where, by which rule, and how to mend it.

The command line prints an `OctoError` as one line and exits with its code; everything else is a bug
and keeps its traceback.
"""

from __future__ import annotations


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

"""Every command says in words that a remote place cannot be reached, whenever that happens and whatever is raised."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from convert_tools import write_checkpoint, write_directory
from fsspec.implementations.memory import MemoryFileSystem

from megatron_octo.convert import api
from megatron_octo.convert.certificate import require_valid
from megatron_octo.errors import EnvironmentProblem, OctoError
from megatron_octo.locations import Location, in_words, locate

CALLS = ("info", "exists", "isfile", "isdir", "ls", "cat_file", "find", "glob", "_open", "put_file")


class NoCredentialsError(Exception):
    """A service's own error, which is no OSError."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_directory(root / "hf")
    write_checkpoint(root / "checkpoint")
    for step in ("step_00000001", "step_00000002"):
        shutil.copytree(root / "checkpoint", root / "run" / "checkpoints" / step)
    return root


@pytest.fixture
def service(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """A copy of all at memory://service. Says how much was asked of it; from then on it gives that many answers."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    MemoryFileSystem().put(f"{made}/", "/service/", recursive=True)
    asked, limit = 0, sys.maxsize

    def limited(plain: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal asked
            asked += 1
            if asked > limit:
                raise NoCredentialsError("Unable to locate credentials")
            return plain(*args, **kwargs)

        return call

    def begin(answers: int) -> int:
        nonlocal asked, limit
        before, asked, limit = asked, 0, answers
        return before

    for name in CALLS:
        monkeypatch.setattr(MemoryFileSystem, name, limited(getattr(MemoryFileSystem, name)))
    return begin


Command = Callable[[Path, Location, Path], object]
COMMANDS: dict[str, Command] = {
    "show": lambda here, there, out: api.show(there / "checkpoint"),
    "show a directory": lambda here, there, out: api.show(there / "hf"),
    "diff": lambda here, there, out: api.diff(there / "checkpoint", here / "hf"),
    "diff with": lambda here, there, out: api.diff(here / "hf", there / "hf"),
    "verify": lambda here, there, out: api.verify(there / "hf"),
    "the gate before RL": lambda here, there, out: require_valid(there / "hf"),
    "to_hf from": lambda here, there, out: api.to_hf(there / "checkpoint", out, here / "hf"),
    "to_hf to": lambda here, there, out: api.to_hf(here / "checkpoint", there / out.name, here / "hf"),
    "to_hf tokenizer": lambda here, there, out: api.to_hf(here / "checkpoint", out, there / "hf"),
    "to_hf_many": lambda here, there, out: api.to_hf_many([(there / "checkpoint", out)], here / "hf"),
    "from_hf from": lambda here, there, out: api.from_hf(there / "hf", out),
    "from_hf to": lambda here, there, out: api.from_hf(here / "hf", there / out.name),
    "relayout from": lambda here, there, out: api.relayout(there / "checkpoint", out, "nemo"),
    "relayout to": lambda here, there, out: api.relayout(here / "checkpoint", there / out.name, "octo"),
    "average": lambda here, there, out: api.average([there / "checkpoint", here / "checkpoint"], out),
    "average last": lambda here, there, out: api.average([there / "run"], out, 2),
    "average to": lambda here, there, out: api.average([here / "run"], there / out.name, 2),
    "truncate": lambda here, there, out: api.truncate(there / "hf", 1, out),
    "truncate a checkpoint": lambda here, there, out: api.truncate(there / "checkpoint", 1, out),
    "truncate to": lambda here, there, out: api.truncate(here / "hf", 1, there / out.name),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_service_that_fails_is_told_in_words(
    made: Path, tmp_path: Path, service: Callable[[int], int], command: str
) -> None:
    """From the first question it is asked, or the second, or amid many, or at the very last."""
    there = locate("memory://service")
    for out in ("cold", "warm"):  # what is imported only now asks too, once
        service(sys.maxsize)
        with suppress(OctoError):  # a model without a tokenizer or a certificate: enough to see how much is asked
            COMMANDS[command](made, there, tmp_path / out)
    asked = service(0)
    assert asked
    for answers in sorted({*range(8), *range(8, asked, asked // 6 + 1), asked - 2, asked - 1} & {*range(asked)}):
        service(answers)
        with pytest.raises(EnvironmentProblem, match="memory://service/.*Unable to locate credentials"):
            COMMANDS[command](made, there, tmp_path / f"failed{answers}")


def test_of_two_remote_places_the_one_that_fails_is_named(service: Callable[[int], int]) -> None:
    there = locate("memory://service")
    service(0)
    with pytest.raises(EnvironmentProblem, match="^memory://service/hf: cannot be reached"):
        api.diff(there / "hf", there / "checkpoint")


def test_what_befalls_this_machine_is_not_blamed_on_a_remote_place() -> None:
    @in_words
    def full(_: Location) -> None:
        raise OSError(28, "No space left on device", "/here")

    with pytest.raises(OSError, match="No space left"):
        full(locate("memory://service"))


def test_both_are_named_where_either_may_be_meant() -> None:
    @in_words
    def command(_: Location, others: list[Location]) -> None:
        raise NoCredentialsError("x")

    with pytest.raises(EnvironmentProblem, match="memory://a or memory://b: cannot be reached"):
        command(locate("memory://a"), [locate("memory://b"), Path("c")])
    with pytest.raises(NoCredentialsError):
        command(Path("a"), [Path("c")])

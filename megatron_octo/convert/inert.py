"""Files that torch saved, read without running anything: what their pickle would build stays a description.

Other trainers keep the arguments of a run in `common.pt`, a pickle. Its plain values are all that is needed. Whatever
class or function it names is neither imported nor called; an `Inert` object keeps the name and the values beside it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import IO, Any, Self

from megatron_octo.errors import CheckpointError, OctoError
from megatron_octo.locations import Location, reaching

_LONGEST = 256 << 20
"""Bytes of a file. Megatron-LM's arguments take some 50 KB, a run's whole common state a few MB."""


class Inert:
    """Stands for an object of a class that is not looked up.

    Args:
        arguments: what the class or function would have been called with.
    """

    named = ""
    """Class or function, e.g. "argparse.Namespace"."""

    arguments: tuple[Any, ...]
    values: dict[Any, Any]
    """Attributes, or the items of a mapping."""

    def __new__(cls, *arguments: Any) -> Self:
        """Set all up here: a pickle may make an object without initialising it."""
        self = super().__new__(cls)
        self.arguments, self.values = arguments, {}
        return self

    def __call__(self, *arguments: Any) -> Inert:
        """A function that the pickle found by another function; it is not called either."""
        return Inert(*arguments)

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            self.values.update(part if isinstance(part, Mapping) else {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.values[key] = value

    def append(self, item: Any) -> None:
        """Take an item of a list-like object."""
        self.arguments = (*self.arguments, item)

    add = append

    def extend(self, items: Any) -> None:
        """Take items of a list-like object."""
        self.arguments = (*self.arguments, *items)


def read_inert(path: Location) -> Any:
    """The values in a file of `torch.save`: plain ones as they are, everything else as `Inert`, tensors without values.

    Args:
        path: e.g. a checkpoint's `common.pt`.

    Raises:
        CheckpointError: it is missing, damaged, too long, or of the time before torch wrote zip archives.
        EnvironmentProblem: a remote file cannot be reached.
    """
    try:
        with reaching(path), path.open("rb") as stream:
            content = io.BytesIO(stream.read(_LONGEST + 1))
        if content.getbuffer().nbytes > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST >> 20} MiB")
        return _values(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "it says which model the weights are of") from None
    except (OctoError, OSError):
        raise
    except Exception as error:  # instructions of a pickle or an archive that make no sense fail in every way there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read ({reason})", "it is a file of torch.save", "copy the file again"
        ) from None


def _values(content: IO[bytes]) -> Any:
    with zipfile.ZipFile(content) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.split("/")[1:] == ["data.pkl"]]
        if len(entries) != 1 or entries[0].file_size > _LONGEST:
            raise ValueError("it holds no pickle, or one that is too long")
        with archive.open(entries[0]) as stream:
            return _Reader(stream).load()


class _Reader(pickle.Unpickler):
    """Finds no class: every name becomes a class of its own that only remembers."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._known: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        named = f"{module}.{name}"
        return self._known.setdefault(named, type("Inert", (Inert,), {"named": named}))

    def persistent_load(self, _: Any) -> None:
        """The values of a tensor, which are not wanted."""

"""A model's weights in one file, or in several with an index that says which tensor lies in which."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

from megatron_octo.errors import DataError
from megatron_octo.locations import Location, reaching

Found = TypeVar("Found")


def gather(
    directory: Location, single: str, index: str, read: Callable[[Location], dict[str, Found]]
) -> dict[str, Found]:
    """What all files of a model hold, every tensor once and each where the index says.

    Args:
        directory: holds the file `single`, or `index` and the files it names.
        single: name of the one file.
        index: name of the index, JSON with the key `weight_map`.
        read: finds the tensors of a file by name.

    Raises:
        DataError: neither or both are there, a file is missing, or index and files disagree; and what `read` raises.
    """
    listed = _weight_map(directory, single, index)
    found: dict[str, Found] = {}
    for file in sorted(set(listed.values())) if listed else [single]:
        path = directory / file
        if not path.is_file():
            raise DataError(f"{path}: missing", f"{index} names it", "copy the directory again, whole")
        for name, item in read(path).items():
            if name in found:
                raise DataError(f"{path}: holds {name}, which another shard holds too", "each tensor is stored once")
            if listed and listed.get(name) != file:
                raise DataError(f"{path}: holds {name}, which {index} does not place there")
            found[name] = item
    absent = [name for name in listed if name not in found]
    if absent:
        raise DataError(
            f"{directory / index}: lists {absent[0]}, which no shard holds",
            "the index and the shards must agree", "copy the directory again",
        )  # fmt: skip
    return found


def read_json(path: Location) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: missing, not JSON, or not an object.
        EnvironmentProblem: a remote file cannot be reached.
    """
    try:
        with reaching(path):
            text = path.read_bytes()
        content = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing", fix="check the path, or copy the directory again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}", "it must be a JSON object")
    return content


def _weight_map(directory: Location, single: str, index: str) -> Mapping[str, str]:
    """Tensor name -> file of a sharded directory, empty for one with a single file."""
    one, several = (directory / single).is_file(), (directory / index).is_file()
    if one and several:
        raise DataError(
            f"{directory}: holds both {single} and {index}",
            "which of the two is the model would be a guess", "remove the one that is not",
        )  # fmt: skip
    if one:
        return {}
    if not several:
        missing = f"holds neither {single} nor {index}" if directory.is_dir() else "no such directory"
        hint = "name a Hugging Face model directory; from the hub: hf download NAME --local-dir DIR"
        raise DataError(f"{directory}: {missing}", fix=hint)
    listed = read_json(directory / index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise DataError(f"{directory / index}: has no weight_map")
    outside = [name for name in listed.values() if not isinstance(name, str) or PurePosixPath(name).name != name]
    if outside:
        raise DataError(f"{directory / index}: names {outside[0]!r}", "shards lie beside their index")
    return listed

"""Arrays that follow from the data and are computed once: published by a rename, mapped by every rank."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.data.index.digest import spot_digest
from megatron_octo.errors import DataError
from megatron_octo.files import flush_to_disk, hash_json, write_json

_ORDER = "order.json"

Arrays = tuple[np.ndarray, ...]


def cached(cache: Path, order: dict[str, Any], names: Sequence[str], compute: Callable[[], Arrays]) -> Arrays:
    """Take arrays from a cache, or compute and publish them there. Safe for several processes.

    Args:
        cache: directory; may be deleted at any time in between.
        order: everything the arrays follow from, in JSON's types; it names and marks them.
        names: of the arrays.
        compute: makes them.

    Returns:
        The arrays, mapped and not read.

    Raises:
        DataError: what is in the cache is damaged or follows from something else.
    """
    directory = cache / hash_json(order)[:24]
    if not directory.is_dir():
        _publish(dict(zip(names, compute(), strict=True)), order, directory)
    return _load(order, names, directory)


def found(cache: Path, order: dict[str, Any], names: Sequence[str]) -> Arrays | None:
    """The same where a cache holds them, else None.

    Raises:
        DataError: what is in the cache is damaged.
    """
    directory = cache / hash_json(order)[:24]
    return _load(order, names, directory) if directory.is_dir() else None


def _publish(arrays: dict[str, np.ndarray], order: dict[str, Any], directory: Path) -> None:
    """Write arrays into a temporary directory and rename it; whoever comes second throws its copy away."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            flush_to_disk(temporary / f"{name}.npy")
        digests = {name: spot_digest(temporary / f"{name}.npy") for name in arrays}
        write_json(temporary / _ORDER, {**order, "arrays": digests})
        os.rename(temporary, directory)
    except OSError:
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(order: dict[str, Any], names: Sequence[str], directory: Path) -> Arrays:
    """Open cached arrays, having seen that they are of this order and not, say, of another seed, or copied in part."""
    try:
        stored = json.loads((directory / _ORDER).read_text(encoding="utf-8"))
        digests = stored.pop("arrays", {}) if isinstance(stored, dict) else {}
        if stored != order:
            raise ValueError(f"it holds the order {stored}, not {order}")
        altered = [name for name in names if spot_digest(directory / f"{name}.npy") != digests.get(name)]
        if altered:
            raise ValueError(f"{altered[0]}.npy is not as it was written")
        return tuple(np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"index cache {directory} is damaged ({error})", "it is computed from the data and can be computed again",
            "delete the directory",
        ) from None  # fmt: skip

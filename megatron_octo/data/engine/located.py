"""Small input files that tasks read by themselves: found once, by whoever starts the build, and the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file


def located(config: DataBuildConfig, paths: Mapping[str, str]) -> DataBuildConfig:
    """The same build with the files of its problems where whoever started it found them, for tasks that others do.

    Args:
        config: as it is written; another machine may have other variables, or other values of them.
        paths: of the files, by the field that names them.
    """
    sets: dict[str, Any] = {}
    for split in ("train", "heldout"):
        wanted = getattr(config.problems, split)
        if wanted is not None and wanted.file is not None:
            path = str(Path(paths[f"problems.{split}.file"]).absolute())
            sets[split] = wanted.model_copy(update={"file": wanted.file.model_copy(update={"path": path})})
    return config.model_copy(update={"problems": config.problems.model_copy(update=sets)})


def on_same_files(files: tuple[tuple[str, str], ...], work: Callable[[Any], dict[str, Any]], task: Any) -> Any:
    """Do a task where certain files are those that the build was started with.

    Args:
        files: path and SHA-256 of each.
        work: does the task.
        task: what to do.

    Raises:
        DataError: a file is missing on this machine, or is another one.
    """
    for path, sha256 in files:
        try:
            found = Path(path).stat()
        except OSError as error:
            _refuse(path, f"cannot be read here ({error.strerror})")
        if _hash(path, found.st_size, found.st_mtime_ns) != sha256:
            _refuse(path, "is another file here than where the build was started, or changed since")
    return work(task)


def _refuse(path: str, why: str) -> None:
    rule = "all machines leave out the same problems and take the same tokenizer, those that the manifest names"
    fix = "copy it to every node, or start again when it is complete"
    raise DataError(f"{path} {why}", rule, fix)


@lru_cache(maxsize=64)
def _hash(path: str, size: int, modified: int) -> str:
    return hash_file(Path(path))

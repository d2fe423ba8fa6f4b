"""Seals: the hash of every file of a checkpoint, written last and checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.errors import CheckpointError
from megatron_octo.files import flush_to_disk, hash_file, hash_weights, write_text
from megatron_octo.locations import reaching

if TYPE_CHECKING:
    from megatron_octo.locations import Location

SEAL = "seal.json"
_FORMAT = 2
_THREADS = 8
_ALTERED = "has been altered: its BLAKE3 differs from the sealed one"


def seal(directory: Path, files: Iterable[str] | None = None, digests: Mapping[str, str] | None = None) -> None:
    """Make every file of a directory durable and write their hashes to `seal.json`, last.

    Args:
        directory: a complete checkpoint that nobody writes to any more.
        files: names of what belongs to it; everything that is there if not given.
        digests: BLAKE3 of files whose writer took it as it wrote them; these are not read again.

    Raises:
        OSError: a file cannot be read or synchronised to disk.
    """
    known = digests or {}

    def entry(name: str) -> dict[str, Any]:
        flush_to_disk(directory / name)
        return _entry(directory / name, known.get(name))

    names = sorted(set(files) - {SEAL}) if files is not None else _files(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(entry, names), strict=True))
    write_text(directory / SEAL, json.dumps({"format": _FORMAT, "files": entries}, indent=1) + "\n")


def verify_seal(directory: Location) -> None:
    """Check a checkpoint against its seal: the same files, sizes and hashes.

    Args:
        directory: the checkpoint, local or remote; every byte is read.

    Raises:
        CheckpointError: no seal, a damaged seal, or a file that is missing, foreign, cut short or altered.
        EnvironmentProblem: a remote checkpoint cannot be reached.
    """
    with reaching(directory):
        _verify(directory)


def _verify(directory: Location) -> None:
    expected = _read_seal(directory)
    present = _files(directory)
    for name in sorted(expected.keys() - set(present)):
        raise _broken(directory / name, "is missing")
    for name in sorted(set(present) - expected.keys()):
        raise _broken(directory / name, "is not part of the sealed checkpoint", "move it somewhere else")
    for name in present:
        size, sealed = (directory / name).stat().st_size, expected[name]["bytes"]
        if size != sealed:
            raise _broken(directory / name, f"holds {size} bytes, sealed with {sealed}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(present, pool.map(lambda name: _entry(directory / name), present), strict=True):
            if found != expected[name]:
                raise _broken(directory / name, _ALTERED)


def verify_file(directory: Location, name: str) -> None:
    """Check one small file of a checkpoint against the seal, before what it says is acted on.

    Raises:
        CheckpointError: no seal, a damaged seal, or the file is missing, foreign or altered.
    """
    expected, path = _read_seal(directory).get(name), directory / name
    if expected is None:
        raise _broken(path, "is not part of the sealed checkpoint", "move it somewhere else")
    if not path.is_file():
        raise _broken(path, "is missing")
    if _entry(path) != expected:
        raise _broken(path, _ALTERED)


def seal_digest(directory: Location) -> str:
    """SHA-256 of the seal itself: one name for the whole content of a checkpoint."""
    return hash_file(directory / SEAL)


def _files(directory: Location) -> list[str]:
    found = (path for path in directory.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(path.relative_to(directory).as_posix() for path in found if path != directory / SEAL)


def _entry(path: Location, digest: str | None = None) -> dict[str, Any]:
    return {"blake3": digest or hash_weights(path), "bytes": path.stat().st_size}


def _read_seal(directory: Location) -> dict[str, dict[str, Any]]:
    path = directory / SEAL
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no {SEAL}", "a checkpoint without a seal was never finished", "use a sealed checkpoint"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise CheckpointError(
                f"{path}: format {content['format']!r}", f"this version reads seals of format {_FORMAT}",
                "a Hugging Face directory exported from it can still be imported: octo convert from-hf",
            )  # fmt: skip
        return {name: {"blake3": entry["blake3"], "bytes": entry["bytes"]} for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(path, "is damaged") from None


def _broken(
    path: Location,
    what: str,
    fix: str = "restore the file from a copy, or set the run's `latest` to an older sealed checkpoint",
) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", "a checkpoint is loaded only if every file is as it was sealed", fix)

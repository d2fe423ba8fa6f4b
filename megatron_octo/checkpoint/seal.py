"""Seals: the hash of every file of a checkpoint, written last and checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_octo.errors import CheckpointError
from megatron_octo.files import hash_file, write_text

SEAL = "seal.json"
_FORMAT = 1
_BLOCK = 4 << 20
_THREADS = 8


def seal(directory: Path) -> None:
    """Make every file of a directory durable and write their hashes to `seal.json`, last.

    Args:
        directory: a complete checkpoint that nobody writes to any more.

    Raises:
        OSError: a file cannot be read or synchronised to disk.
    """
    files = _files(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(files, pool.map(lambda name: _entry(directory / name, durable=True), files), strict=True))
    write_text(directory / SEAL, json.dumps({"format": _FORMAT, "files": entries}, indent=1) + "\n")


def verify_seal(directory: Path) -> None:
    """Check a checkpoint against its seal: the same files, sizes and hashes.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: no seal, a damaged seal, or a file that is missing, foreign, cut short or altered.
    """
    expected = _read_seal(directory)
    present = _files(directory)
    for name in sorted(expected.keys() - set(present)):
        raise _broken(directory / name, "is missing")
    for name in sorted(set(present) - expected.keys()):
        raise _broken(directory / name, "is not part of the sealed checkpoint")
    for name in present:
        size, sealed = (directory / name).stat().st_size, expected[name]["bytes"]
        if size != sealed:
            raise _broken(directory / name, f"holds {size} bytes, sealed with {sealed}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(present, pool.map(lambda name: _entry(directory / name), present), strict=True):
            if found != expected[name]:
                raise _broken(directory / name, "has been altered: its SHA-256 differs from the sealed one")


def seal_digest(directory: Path) -> str:
    """SHA-256 of the seal itself: one name for the whole content of a checkpoint."""
    return hash_file(directory / SEAL)


def _files(directory: Path) -> list[str]:
    found = (path for path in directory.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(str(path.relative_to(directory)) for path in found if path != directory / SEAL)


def _entry(path: Path, *, durable: bool = False) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if durable:
            os.fsync(stream.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def _read_seal(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / SEAL
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no {SEAL}", "a checkpoint without a seal was never finished", "use a sealed checkpoint"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: {"sha256": entry["sha256"], "bytes": entry["bytes"]} for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(path, "is damaged") from None


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}",
        "a checkpoint is loaded only if every file is as it was sealed",
        "restore the file from a copy, or set the run's `latest` to an older sealed checkpoint",
    )

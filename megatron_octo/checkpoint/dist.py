"""Reading and writing torch_dist checkpoints without process groups: names, shapes, tensors one by one.

Keys are megatron-core's parameter names, one per layer (`decoder.layers.0.self_attention.linear_qkv.weight`),
each a whole tensor whatever layout saved it. Optimizer state lies beside them under `optimizer.state.*`.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_octo.checkpoint.seal import seal
from megatron_octo.checkpoint.store import write_facts
from megatron_octo.errors import CheckpointError
from megatron_octo.files import flush_to_disk

METADATA = ".metadata"
_OPTIMIZER = "optimizer."
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_DESCRIPTION = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_DESCRIPTION, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    *((_DESCRIPTION, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    (_DESCRIPTION, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


class TensorFacts(NamedTuple):
    """Global shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_metadata(directory: Path, *, optimizer: bool = False) -> dict[str, TensorFacts]:
    """Names, global shapes and dtypes of the stored tensors, in name order.

    Args:
        directory: a checkpoint.
        optimizer: also list optimizer state.

    Raises:
        CheckpointError: the metadata file is missing, damaged, or names code it should not.
    """
    stored = _metadata(directory).state_dict_metadata
    return {
        name: TensorFacts(tuple(item.size), item.properties.dtype)
        for name, item in sorted(stored.items())
        if isinstance(item, TensorStorageMetadata) and (optimizer or not name.startswith(_OPTIMIZER))
    }


def stored_names(directory: Path) -> set[str]:
    """Keys of everything stored: tensors and objects."""
    return set(_metadata(directory).state_dict_metadata)


def iterate_tensors(directory: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors one by one, whole, on the CPU; memory holds one at a time.

    Args:
        directory: a checkpoint; verify its seal first.
        names: which to read, in this order; all model tensors if not given.

    Yields:
        (name, tensor) in the stored shape and dtype.

    Raises:
        CheckpointError: a name the checkpoint lacks.
    """
    facts = read_metadata(directory, optimizer=True)
    reader = _CachedReader(str(directory))
    for name in names if names is not None else read_metadata(directory):
        if name not in facts:
            raise CheckpointError(f"{directory}: no tensor named '{name}'")
        target = {name: torch.empty(facts[name].shape, dtype=facts[name].dtype)}
        torch_checkpoint.load(target, storage_reader=reader, no_dist=True)
        yield name, target[name]


def write_model(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], facts: dict[str, Any]) -> None:
    """Write a sealed, weights-only checkpoint that megatron-core loads in any layout.

    The tensors are held together until they are written: hand over memory-mapped ones where they are many.

    Args:
        directory: must not exist yet; it appears complete and sealed or not at all.
        tensors: (megatron-core parameter name, whole tensor) pairs.
        facts: what `run.json` shall say; step, run_tokens, tokens and moments are filled in.

    Raises:
        CheckpointError: the directory exists.
        OSError: a file could not be written, for example because the disk is full.
    """
    if directory.exists():
        raise CheckpointError(f"{directory}: exists", "a checkpoint is never overwritten", "choose another path")
    temporary = directory.with_name(f".tmp-{directory.name}")
    _empty(temporary)
    try:
        writer = torch_checkpoint.FileSystemWriter(str(temporary))
        torch_checkpoint.save(dict(tensors), storage_writer=writer, no_dist=True)
        torch.save({}, temporary / "common.pt")
        (temporary / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
        write_facts(temporary, {"step": 0, "run_tokens": 0, "tokens": 0, **facts, "moments": False})
        seal(temporary)
        temporary.rename(directory)
    except CheckpointException as error:
        raise cause_of(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_to_disk(directory.parent)


def cause_of(error: CheckpointException) -> BaseException:
    """The first failing rank's own error, so that a full disk is seen as one; else the error itself."""
    for failure, _ in error.failures.values():
        found: BaseException | None = failure
        while found is not None:
            if isinstance(found, OSError):
                return found
            found = found.__cause__ or found.__context__
    return error


def check_metadata_pickle(directory: Path) -> None:
    """Refuse a `.metadata` file that would run code: torch reads it with pickle.

    Raises:
        CheckpointError: the file is missing, damaged, or names anything but torch's checkpoint classes.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as stream:
            if not isinstance(_NamesOnly(stream).load(), Metadata):
                raise pickle.UnpicklingError("it holds something else")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "it lists the checkpoint's tensors") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be trusted ({error})", "it may only list tensors") from None


class _NamesOnly(pickle.Unpickler):
    """Unpickles classes of the checkpoint format and nothing else."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)

    def find_class(self, module: str, name: str) -> Any:
        a_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not a_type and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _CachedReader(torch_checkpoint.FileSystemReader):
    """Reads the metadata once, however many tensors are asked for."""

    _cached: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._cached is None:
            self._cached = super().read_metadata(*args, **kwargs)
        return self._cached


def _metadata(directory: Path) -> Metadata:
    check_metadata_pickle(directory)
    return torch_checkpoint.FileSystemReader(str(directory)).read_metadata()


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)

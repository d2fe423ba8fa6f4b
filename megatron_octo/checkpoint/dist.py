"""Reading torch_dist checkpoints without process groups: names, shapes, and any run of a tensor's rows.

Keys are megatron-core's parameter names, one per layer (`decoder.layers.0.self_attention.linear_qkv.weight`) or one
for all layers stacked (`decoder.layers.self_attention.linear_qkv.weight`), each a whole tensor cut into chunks along
any axis by the layout that saved it. Optimizer state lies beside them under `optimizer.`.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import index
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_octo.checkpoint.record import Unreadable, find_values
from megatron_octo.checkpoint.tensors import Shape
from megatron_octo.errors import CheckpointError, DataError, OctoError
from megatron_octo.locations import reaching, read_range

if TYPE_CHECKING:
    from megatron_octo.locations import Location

METADATA = ".metadata"
_OPTIMIZER = "optimizer."
_DESCRIPTION = "torch.distributed.checkpoint.metadata"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_PLAN = "torch.distributed.checkpoint.planner"
_ALLOWED = {
    *((_DESCRIPTION, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    *((_DESCRIPTION, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    (_DESCRIPTION, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    (_MEGATRON, "MCoreMetadata"),
    # megatron-core's own writer keeps the plan of every rank beside the list of tensors.
    *((_PLAN, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}


class TensorFacts(NamedTuple):
    """Global shape and dtype of a stored tensor."""

    shape: Shape
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a checkpoint keeps a tensor: its key there, and the index on the first axis of a stack of layers."""

    name: str
    layer: int | None = None


class TorchDist:
    """The tensors of one torch_dist checkpoint, read from its files a run of rows at a time.

    Args:
        directory: holds `.metadata` and the `.distcp` files.
        places: the name to give each tensor, and where the checkpoint keeps it. A tensor (or a layer of a stack) that
            no place names keeps its stored name, so that what was forgotten shows; a place that names nothing stored
            is left out. Without places every tensor has its stored name.
        optimizer: also give the optimizer's tensors.

    Raises:
        CheckpointError: the list of tensors is missing, damaged, names code, or does not cover a tensor exactly once.
    """

    def __init__(self, directory: Location, places: Mapping[str, Place] | None = None, optimizer: bool = False) -> None:
        self.where = str(directory)
        self._directory = directory
        with _as_listed(directory) as metadata:
            self._facts = _tensors(metadata, optimizer)
            self._chunks = {name: _chunks(directory, name, facts, metadata) for name, facts in self._facts.items()}
        self._places = _complete(places or {}, self._facts)
        self._values: dict[_Chunk, int] = {}

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor, by name."""
        return {
            name: self._facts[place.name].shape[0 if place.layer is None else 1 :]
            for name, place in self._places.items()
        }

    def dtype(self, name: str) -> str:
        """Dtype a tensor is stored in, e.g. "bfloat16"."""
        return str(self._facts[self._places[name].name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read rows `start` to `start + len(out)` of a tensor into `out`, contiguous and of its dtype.

        Raises:
            CheckpointError: a file is missing, cut short, or does not hold what the list of tensors says.
        """
        place = self._places[name]
        target, first = (out, ()) if place.layer is None else (out[None], (place.layer,))
        begin = (*first, start, *(0 for _ in out.shape[1:]))[: target.dim()]
        for chunk in self._chunks[place.name]:
            low = [max(*pair) for pair in zip(begin, chunk.offsets, strict=True)]
            high = [
                min(b + length, offset + size)
                for b, length, offset, size in zip(begin, target.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(a < b for a, b in zip(low, high, strict=True)):
                part = target[tuple(slice(a - b, c - b) for a, b, c in zip(low, begin, high, strict=True))]
                self._read(chunk, [a - b for a, b in zip(low, chunk.offsets, strict=True)], part)

    def _read(self, chunk: _Chunk, origin: list[int], part: torch.Tensor) -> None:
        """Read what lies in a chunk from an index on; only the layer or the rows are ever cut, so it is one run."""
        run = part if part.is_contiguous() else torch.empty(part.shape, dtype=part.dtype)
        skipped = sum(i * math.prod(chunk.sizes[axis + 1 :]) for axis, i in enumerate(origin))
        path = self._directory / chunk.file
        try:
            if chunk not in self._values:
                self._values[chunk] = find_values(path, chunk.start, chunk.length, chunk.sizes, part.dtype)
            position = self._values[chunk] + skipped * part.itemsize
            read_range(path, position, memoryview(run.reshape(-1).view(torch.uint8).numpy()))
        except FileNotFoundError:
            raise _broken(path, "no such file", chunk.tensor) from None
        except Unreadable as error:
            raise _broken(path, str(error), chunk.tensor) from None
        except DataError as error:
            raise _broken(path, error.what.removeprefix(f"{path}: "), chunk.tensor) from None
        except OSError as error:
            if error.errno != errno.EINVAL:  # which a position is that no file has
                raise
            raise _broken(path, f"has no byte {chunk.start + chunk.length}", chunk.tensor) from None
        if run is not part:
            part.copy_(run)


class _Chunk(NamedTuple):
    """A box of a stored tensor, and the archive that holds it."""

    tensor: str
    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


def read_metadata(directory: Location, *, optimizer: bool = False) -> dict[str, TensorFacts]:
    """Names, global shapes and dtypes of the stored tensors, in name order.

    Args:
        directory: a checkpoint.
        optimizer: also list optimizer state.

    Raises:
        CheckpointError: the metadata file is missing, damaged, or names code it should not.
    """
    with _as_listed(directory) as metadata:
        return _tensors(metadata, optimizer)


def stored_names(directory: Location) -> set[str]:
    """Keys of everything stored: tensors and objects.

    Raises:
        CheckpointError: as for `read_metadata`; or something lies in a file outside the checkpoint.
    """
    with _as_listed(directory) as metadata:
        for key, stored in (metadata.storage_data or {}).items():
            _check_file(directory / METADATA, key.fqn, stored)
        return set(metadata.state_dict_metadata)


class _NamesOnly(pickle.Unpickler):
    """Unpickles classes of the checkpoint format and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":
            return PurePosixPath
        a_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not a_type and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def _as_listed(directory: Location) -> Iterator[Metadata]:
    """The list of tensors, for use within the block: what damage does to it may show only there."""
    path = directory / METADATA
    try:
        with reaching(path), path.open("rb") as stream:
            content = io.BytesIO(stream.read())
        metadata = _NamesOnly(content).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it holds something else")
        yield metadata
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "it lists the checkpoint's tensors") from None
    except (OctoError, OSError):
        raise
    except Exception as error:  # a damaged pickle fails in every way there is, out of memory included
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: cannot be trusted ({reason})", "it may only list tensors") from None


def _tensors(metadata: Metadata, optimizer: bool) -> dict[str, TensorFacts]:
    facts = {}
    for name, item in sorted(metadata.state_dict_metadata.items()):
        if isinstance(item, TensorStorageMetadata) and (optimizer or not name.startswith(_OPTIMIZER)):
            facts[name] = TensorFacts(tuple(map(index, item.size)), item.properties.dtype)
            if not isinstance(facts[name].dtype, torch.dtype):
                raise TypeError(f"'{name}' has no dtype")
    return facts


def _complete(places: Mapping[str, Place], facts: Mapping[str, TensorFacts]) -> dict[str, Place]:
    """The places that exist, then a place of its own for everything stored that none of them names."""

    def exists(place: Place) -> bool:
        shape = facts[place.name].shape if place.name in facts else ()
        return place.name in facts and (place.layer is None or 0 <= place.layer < (*shape, 0)[0])

    found = {name: place for name, place in places.items() if exists(place)}
    named = set(found.values())
    stacks = {place.name for place in named if place.layer is not None}
    for name, (shape, _) in facts.items():
        if name not in stacks and Place(name) not in named:
            found[name] = Place(name)
        elif name in stacks:
            rest = (Place(name, layer) for layer in range(shape[0]))
            found.update((f"{name}[{place.layer}]", place) for place in rest if place not in named)
    return found


def _chunks(directory: Location, name: str, facts: TensorFacts, metadata: Metadata) -> list[_Chunk]:
    path = directory / METADATA
    chunks = []
    for listed in metadata.state_dict_metadata[name].chunks:
        offsets, sizes = tuple(listed.offsets), tuple(listed.sizes)
        stored = (metadata.storage_data or {}).get(MetadataIndex(name, offsets))
        _check_file(path, name, stored)
        if getattr(stored, "transform_descriptors", None):
            raise _broken(path, f"stored through {', '.join(stored.transform_descriptors)}", name)
        start, length = index(stored.offset), index(stored.length)
        if min(start, length) < 0:
            raise _broken(path, "lies before its file's start", name)
        chunks.append(_Chunk(name, offsets, sizes, stored.relative_path, start, length))
    if not _tiles(facts.shape, chunks):
        raise _broken(path, "its chunks do not cover it exactly once", name)
    return chunks


def _check_file(path: Location, name: str, stored: Any) -> None:
    if stored is None or PurePosixPath(stored.relative_path).name != stored.relative_path:
        raise _broken(path, "names no file of this checkpoint", name)


def _tiles(shape: Shape, chunks: list[_Chunk]) -> bool:
    """Whether boxes fill a shape without overlap: inside, apart from each other, and of its volume in all."""
    if any(len(c.offsets) != len(shape) or len(c.sizes) != len(shape) for c in chunks):
        return False
    inside = all(o >= 0 and o + s <= n for c in chunks for o, s, n in zip(c.offsets, c.sizes, shape, strict=True))
    return inside and sum(math.prod(c.sizes) for c in chunks) == math.prod(shape) and not _overlap(chunks)


def _overlap(chunks: list[_Chunk]) -> bool:
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    for number, one in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if one.offsets and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            both = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in both):
                return True
    return False


def _broken(path: Location, what: str, tensor: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what} (tensor '{tensor}')",
        "a checkpoint is read only if its files hold what its list of tensors says",
        "restore the file from a copy, or use another checkpoint",
    )

"""Pickled weights as a source of tensors, for who asks for them: opened by torch's restricted reader only.

The files are mapped, so their pages count as this process's memory while the machine has room.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.checkpoint.tensors import Shape
from megatron_octo.convert.safetensors_io import ITEM_BYTES
from megatron_octo.convert.shards import gather
from megatron_octo.errors import DataError
from megatron_octo.locations import Location

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"


class PickledDirectory:
    """The weights of one Hugging Face directory of `.bin` files, a source of tensors.

    Args:
        directory: on this machine; holds `pytorch_model.bin`, or shards and `pytorch_model.bin.index.json`.

    Raises:
        DataError: no such weights, a shard missing or damaged, index and shards disagree, or a file asks for more than
            tensors; nothing in it is run.
    """

    def __init__(self, directory: Location) -> None:
        self.where = str(directory)
        if not isinstance(directory, Path):
            raise DataError(f"{directory}: pickled weights are read from this machine only", fix="copy them here first")
        self._tensors = gather(directory, SINGLE_FILE, INDEX_FILE, _load)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, shard by shard."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, torch's name without the prefix."""
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Read rows `start` to `start + len(out)` of a tensor into `out`, see `TensorSource.fill`."""
        out.copy_(self._tensors[name][start : start + len(out)])


def _load(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DataError(f"{path}: asks for more than tensors", "nothing in it was run", "get safetensors") from None
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the reader fail in many ways
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not weights that torch saved ({reason})", fix="copy the file again") from None
    tensors = held if isinstance(held, dict) else {"the file": held}
    for name, tensor in tensors.items():
        kind = type(tensor).__name__
        if isinstance(tensor, torch.Tensor):
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        if kind not in ITEM_BYTES or not isinstance(name, str):
            raise DataError(f"{path}: {name!r} is {kind}", f"weights are named tensors of {', '.join(ITEM_BYTES)}")
    return {name: tensor.detach() for name, tensor in tensors.items()}

"""The Megatron side of a conversion: a sealed checkpoint's tensors, and what its run says about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.seal import SEAL, seal_digest
from megatron_octo.checkpoint.store import FACTS, latest_checkpoint, read_facts
from megatron_octo.config.load import parse_config
from megatron_octo.config.run import ModelConfig
from megatron_octo.convert.rules import Geometry, Shape
from megatron_octo.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class CheckpointTensors:
    """The model tensors of one checkpoint, optimizer state left out.

    Args:
        directory: a sealed checkpoint.
        dtype: torch's name of a dtype to cast to ("bfloat16"), or None for the stored one.

    Raises:
        CheckpointError: the list of tensors is missing or damaged.
    """

    def __init__(self, directory: Path, dtype: str | None = None) -> None:
        from megatron_octo.checkpoint.dist import iterate_tensors, read_metadata

        self.where = str(directory)
        self._cast = dtype
        self._facts = read_metadata(directory)
        self._wanted = ""
        # One stream for all reads: it opens the checkpoint's index once and is asked for names as they come.
        self._stream = iterate_tensors(directory, self._requests())

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every model tensor, by name."""
        return {name: facts.shape for name, facts in self._facts.items()}

    def dtype(self, name: str) -> str:
        """Dtype in which `read` gives a tensor, e.g. "bfloat16"."""
        return self._cast or self.stored_dtype(name)

    def stored_dtype(self, name: str) -> str:
        """Dtype a tensor is stored in."""
        return str(self._facts[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on CPU."""
        import torch

        self._wanted = name
        tensor = next(self._stream)[1]
        return tensor.to(getattr(torch, self._cast)) if self._cast else tensor

    def _requests(self) -> Iterator[str]:
        while True:
            yield self._wanted


@dataclass(frozen=True, slots=True)
class Origin:
    """Where exported weights come from."""

    checkpoint: Path
    model: ModelConfig
    tokenizer: Path | None
    facts: dict[str, Any]

    @property
    def lineage(self) -> dict[str, Any]:
        """What a certificate says about the origin: run, position in tokens, ancestors, and the seal's own hash."""
        config = self.facts.get("config") or {}
        return {
            "checkpoint": str(self.checkpoint.resolve()),
            "seal": seal_digest(self.checkpoint),
            "run": config.get("name"),
            **{key: self.facts.get(key) for key in ("step", "run_tokens", "tokens", "lineage", "source")},
        }


def geometry(model: ModelConfig) -> Geometry:
    """Sizes of a model as Megatron pads it."""
    from megatron_octo.model.translate import padded_vocabulary

    return Geometry.of(model, padded_vocabulary(model.vocabulary))


def find_checkpoint(path: Path) -> Path:
    """A sealed checkpoint directory as it is, or the latest one of a run directory.

    Raises:
        CheckpointError: neither.
    """
    if (path / SEAL).is_file() or (path / FACTS).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory", fix="name a checkpoint or a run directory")
    return latest_checkpoint(path)


def read_origin(checkpoint: Path) -> Origin:
    """Read a checkpoint's `run.json`: the model, and the tokenizer it was trained with where that is still there.

    Raises:
        CheckpointError: no `run.json`, or it names no model.
        ConfigError: the model it names is not one of ours.
    """
    facts = read_facts(checkpoint)
    config = facts.get("config") or {}
    values = config.get("model") or facts.get("model")
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint / FACTS}: says nothing about the model", "its sizes are needed to convert")
    named = (config.get("data") or {}).get("tokenizer") or facts.get("tokenizer")
    tokenizer = Path(named) if named and Path(named).is_dir() else None
    return Origin(checkpoint, parse_config(ModelConfig, values, str(checkpoint / FACTS)), tokenizer, facts)

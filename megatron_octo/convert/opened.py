"""A model directory of either format, opened without reading a value: where the tools start from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_octo.checkpoint.tensors import TensorSource
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import hf_io
from megatron_octo.convert.megatron_io import Origin, find_checkpoint, geometry, read_origin
from megatron_octo.convert.rules import Geometry, Table
from megatron_octo.convert.safetensors_io import INDEX_FILE, SINGLE_FILE
from megatron_octo.convert.tables import table_of
from megatron_octo.convert.views import AsHuggingFace
from megatron_octo.locations import Location, reaching


@dataclass(frozen=True)
class Opened:
    """A model's weights with what their directory says about them.

    Args:
        directory: the Hugging Face directory, or the checkpoint itself (never its run).
        tensors: the weights under the names of their format.
        origin: what a checkpoint says of itself; None for a Hugging Face directory.
    """

    directory: Location
    tensors: TensorSource
    origin: Origin | None

    @cached_property
    def model(self) -> ModelConfig:
        """The architecture; ConfigError or DataError where it is not said or not one of ours."""
        return hf_io.read_model(self.directory) if self.origin is None else self.origin.model

    @property
    def mapping(self) -> tuple[Table, Geometry]:
        """The family's table and the model's geometry."""
        return table_of(self.model.family), geometry(self.model)

    def as_hugging_face(self) -> TensorSource:
        """The weights under Hugging Face names, whatever the format."""
        return self.tensors if self.origin is None else AsHuggingFace(*self.mapping, self.tensors)


def is_hugging_face(path: Location) -> bool:
    """Whether a directory is a Hugging Face model's, by the files it holds.

    Raises:
        EnvironmentProblem: a remote directory cannot be reached.
    """
    with reaching(path):
        return any((path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE, hf_io.CONFIG_FILE))


def open_model(path: Location) -> Opened:
    """Open a Hugging Face directory, a checkpoint, or the latest checkpoint of a run.

    Raises:
        DataError: a damaged Hugging Face directory, or one of pickled weights.
        CheckpointError: no checkpoint there, or a damaged one.
        ConfigError: a checkpoint of an architecture that is not ours.
    """
    if is_hugging_face(path):
        return Opened(path, hf_io.open_weights(path), None)
    origin = read_origin(find_checkpoint(path))
    return Opened(origin.checkpoint, origin.tensors(), origin)

"""New models from old ones: the average of several checkpoints, and the first layers of a model.

Both are sources of tensors over other sources, so both are written in blocks whatever their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.store import read_facts, sealed_checkpoints
from megatron_octo.checkpoint.tensors import Shape, TensorSource, row_blocks
from megatron_octo.config.load import differences
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import hf_io
from megatron_octo.convert.certificate import versions
from megatron_octo.convert.megatron_io import HUGGING_FACE, Origin, find_checkpoint, read_origin
from megatron_octo.convert.opened import Opened, is_hugging_face, open_model
from megatron_octo.convert.safetensors_io import write_safetensors
from megatron_octo.convert.shards import read_json
from megatron_octo.convert.tables import megatron_shapes, source_shapes
from megatron_octo.convert.views import AsHuggingFace, AsMegatron, Watched
from megatron_octo.errors import CheckpointError, ConfigError
from megatron_octo.files import write_json
from megatron_octo.locations import Location, in_words
from megatron_octo.publish import publishing, refuse_existing

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_BYTES = 4 * 2**20
"""Of the sum, as float64; small enough to stay in the processor's cache."""
_NOT_OF_WEIGHTS = {"init_std", "max_positions"}
"""Settings that give weights no other meaning: how they were drawn, and the longest text."""


class Averaged:
    """The mean of several models' tensors, summed as float64 and rounded by torch (to bfloat16 by way of float32).

    Args:
        parts: two or more sources of the same names, shapes and dtypes.

    Raises:
        CheckpointError: they differ in a name, a shape or a dtype.
    """

    def __init__(self, parts: Sequence[TensorSource]) -> None:
        first, *others = parts
        for other in others:
            _require_alike(first, other)
        self.where = f"average of {len(parts)} checkpoints"
        self._parts = parts

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, by name."""
        return self._parts[0].shapes()

    def dtype(self, name: str) -> str:
        """Dtype of a tensor: that of the parts."""
        return self._parts[0].dtype(name)

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Average rows `start` to `start + len(out)` of a tensor into `out`.

        Raises:
            CheckpointError: a value of a part is not finite: it would spoil the average unseen.
        """
        import torch

        for first, count in row_blocks(tuple(out.shape), torch.float64.itemsize, _BLOCK_BYTES):
            rows, total = out[first : first + count], None
            for part in self._parts:
                part.fill(name, start + first, rows)
                if not bool(rows.isfinite().all()):
                    raise CheckpointError(f"{part.where}: {name} holds values that are not finite", fix="leave it out")
                # The first is not added to zeros: a mean of -0 is -0, and of equal models the model.
                total = rows.double() if total is None else total.add_(rows)
            assert total is not None
            rows.copy_(total.div_(len(self._parts)))


class Selected:
    """Some of a source's tensors.

    Args:
        source: where they are read from.
        shapes: names and shapes of those that are kept, in their new order.
    """

    def __init__(self, source: TensorSource, shapes: Mapping[str, Shape]) -> None:
        self.where, self._source, self._shapes = source.where, source, dict(shapes)
        self.dtype, self.fill = source.dtype, source.fill

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor that is kept, by name."""
        return self._shapes


@in_words
def average(paths: Sequence[Location], out: Location, last: int | None = None) -> dict[str, Any]:
    """Write the average of checkpoints as a sealed weights-only checkpoint.

    Args:
        paths: checkpoints or runs (their latest checkpoint) of one model; with `last`, one run.
        out: checkpoint directory to create.
        last: how many of the run's newest checkpoints to average.

    Returns:
        The checkpoint's `run.json`; `source.average_of` names its parts.

    Raises:
        ConfigError: fewer than two checkpoints, one named twice, other models, or `out` exists.
        CheckpointError: a part is missing or altered, differs in a tensor's shape or dtype, or is not finite.
    """
    from megatron_octo.checkpoint.dist_write import write_model

    refuse_existing(out)
    origins = [read_origin(path) for path in (_newest(paths, last) if last is not None else _named(paths))]
    for origin in origins:
        _require_same_model(origins[0], origin)
        origin.require_intact()
    newest = origins[-1]
    parts = [origin.lineage for origin in origins]
    tokens = max(origin.facts.get("tokens") or 0 for origin in origins)
    facts = _facts(newest.model, {"average_of": parts}, tokens)
    with Watched("average", Averaged([origin.tensors() for origin in origins])) as source:
        write_model(out, source, facts, {"average_of": parts}, extras=_carried(newest))
    return read_facts(out)


@in_words
def truncate(path: Location, layers: int, out: Location) -> None:
    """Write a model's first layers, byte for byte, in the format it has: a toy of a real model.

    Args:
        path: a Hugging Face directory (it stays one, tokenizer carried), or a checkpoint or run (a sealed checkpoint).
        layers: number of layers to keep, fewer than the model has.
        out: directory to create.

    Raises:
        ConfigError: that many layers are not to be cut from this model, or `out` exists.
        DataError: tensors that do not cover the model, or a damaged Hugging Face directory.
        CheckpointError: no checkpoint there, or an altered one.
    """
    refuse_existing(out)
    opened = open_model(path)
    if not 0 < layers < opened.model.layers:
        raise ConfigError(f"{layers} layers of {path}", f"it has {opened.model.layers}", "keep at least one, and fewer")
    if opened.origin is None:
        _truncate_directory(opened, layers, out)
    else:
        _truncate_checkpoint(opened, opened.origin, layers, out)


def _truncate_directory(opened: Opened, layers: int, out: Location) -> None:
    table, size = opened.mapping
    AsMegatron(table, size, opened.tensors)  # refuses a directory that does not hold the model
    kept = Selected(opened.tensors, source_shapes(table, replace(size, layers=layers)))
    made_from = {"truncate": layers, "files": _identity(opened.directory)}
    with publishing(out, made_from, last=hf_io.CONFIG_FILE) as partial:
        write_safetensors(partial, kept)
        hf_io.copy_assets(opened.directory, partial.directory)
        values = read_json(opened.directory / hf_io.CONFIG_FILE)
        values.pop("auto_map", None)  # names files of code, which do not travel
        # transformers lists the kind of each layer for some families and refuses a list of another length.
        kinds = {"layer_types": values["layer_types"][:layers]} if values.get("layer_types") else {}
        write_json(partial.directory / hf_io.CONFIG_FILE, {**values, "num_hidden_layers": layers, **kinds})


def _truncate_checkpoint(opened: Opened, origin: Origin, layers: int, out: Location) -> None:
    from megatron_octo.checkpoint.dist_write import write_model

    table, size = opened.mapping
    AsHuggingFace(table, size, opened.tensors)  # refuses a checkpoint that does not hold the model
    origin.require_intact()
    kept = Selected(opened.tensors, megatron_shapes(table, replace(size, layers=layers)))
    source = {"truncated_from": origin.lineage, "layers": layers}
    model = origin.model.model_copy(update={"layers": layers})
    write_model(out, kept, _facts(model, source, origin.facts.get("tokens") or 0), source, extras=_carried(origin))


def _named(paths: Sequence[Location]) -> list[Location]:
    checkpoints = [_checkpoint(path) for path in paths]
    if len(checkpoints) < 2:
        raise ConfigError("one checkpoint is no average", fix="name two or more, or a run and how many: --last K")
    resolved = [str(checkpoint.resolve()) for checkpoint in checkpoints]
    for place in resolved:
        if resolved.count(place) > 1:
            raise ConfigError(f"{place}: named twice", "each part counts once", "name different checkpoints")
    return checkpoints


def _newest(paths: Sequence[Location], last: int) -> list[Location]:
    if len(paths) != 1 or last < 2:
        raise ConfigError(f"the last {last} of {len(paths)} paths", "at least two checkpoints of one run are averaged")
    found = sealed_checkpoints(paths[0])
    if len(found) < last:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{paths[0]}: {len(found)} sealed checkpoints, not {last}",
            f"there are: {names}", "name a run, and fewer; checkpoint.keep says how many a run keeps",
        )  # fmt: skip
    return found[-last:]


def _checkpoint(path: Location) -> Location:
    if is_hugging_face(path):
        raise ConfigError(
            f"{path}: a Hugging Face directory", "checkpoints are averaged", "convert it: octo convert from-hf"
        )
    return find_checkpoint(path)


def _require_same_model(one: Origin, other: Origin) -> None:
    plain = [origin.model.model_dump(mode="json", exclude=_NOT_OF_WEIGHTS) for origin in (one, other)]
    found = differences(*plain)
    if found:
        raise ConfigError(
            f"{one.checkpoint} and {other.checkpoint} are different models: {'; '.join(found)}",
            "only checkpoints of one model have an average",
        )


def _require_alike(one: TensorSource, other: TensorSource) -> None:
    mine, theirs = one.shapes(), other.shapes()
    for name in [*mine, *theirs]:
        sides = [
            f"{source.dtype(name)} {list(shapes[name])}" if name in shapes else "nothing"
            for source, shapes in ((one, mine), (other, theirs))
        ]
        if sides[0] != sides[1]:
            raise CheckpointError(
                f"{name}: {sides[0]} in {one.where}, {sides[1]} in {other.where}",
                "averaged are checkpoints of the same tensors",
            )


def _facts(model: ModelConfig, source: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {
        "model": model.model_dump(mode="json"),
        "source": source,
        "tokens": tokens,
        "versions": versions(),
    }


def _carried(origin: Origin) -> Callable[[Path], None]:
    """Puts what travels with a model (tokenizer, licence) into the new checkpoint, so that it stands alone."""
    return lambda directory: hf_io.carry(origin.assets, origin.tokenizer, directory / HUGGING_FACE)


def _identity(directory: Location) -> dict[str, Any]:
    """What tells a directory from another or a later one, for nothing: hashing all of a large model for a few layers
    would cost more than the layers.
    """
    files = sorted((path for path in directory.iterdir() if path.is_file()), key=lambda path: path.name)
    return {"directory": str(directory), **{path.name: [(s := path.stat()).st_size, s.st_mtime] for path in files}}

"""The Megatron side of a conversion: a checkpoint's tensors under one set of names, and what it says about its model.

Checkpoints of our own and those of Megatron-LM, Megatron-Bridge and NeMo 2.x are read alike. They differ in the folder
the weights lie in, in whether layers are stacked in one tensor, and in how far the vocabulary is padded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.seal import SEAL, seal_digest, verify_seal
from megatron_octo.checkpoint.store import FACTS, latest_checkpoint, read_facts
from megatron_octo.checkpoint.tensors import Shape, TensorSource
from megatron_octo.config.load import parse_config
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.foreign import (
    CONTEXT,
    FORMATS,
    LIST,
    TRACKER,
    WEIGHTS,
    describe,
    layout_at,
    model_of,
    named_directory,
    section,
)
from megatron_octo.convert.layouts import LAYOUTS
from megatron_octo.convert.rules import Geometry
from megatron_octo.errors import CheckpointError
from megatron_octo.files import hash_json, hash_weights
from megatron_octo.locations import Location, reaching
from megatron_octo.model.translate import padded_vocabulary

if TYPE_CHECKING:
    import torch

    from megatron_octo.checkpoint.dist import Place

HUGGING_FACE = "hugging_face"
"""Folder of a checkpoint for what its model needs beside the weights: tokenizer, generation settings, licence."""

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_NOT_WEIGHTS = re.compile(r"(^|\.)optimizer\.")


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Args:
        checkpoint: the checkpoint's directory.
        layout: whose it is: "octo", "megatron-lm", "megatron-bridge" or "nemo".
        model: its architecture.
        tokenizer: directory of the tokenizer it was trained with, where that is known and there.
        facts: what our `run.json` says; of others' checkpoints the step.
    """

    checkpoint: Location
    layout: str
    model: ModelConfig
    tokenizer: Location | None
    facts: dict[str, Any]

    @property
    def assets(self) -> Location | None:
        """What was carried along beside the weights, if anything."""
        folder = self.checkpoint / HUGGING_FACE
        return folder if folder.is_dir() else None

    @property
    def lineage(self) -> dict[str, Any]:
        """What a certificate says about the origin: run, position in tokens, ancestors, and a hash of the whole."""
        config = self.facts.get("config") or {}
        return {
            "checkpoint": str(self.checkpoint.resolve()),
            "layout": self.layout,
            "seal": self.digest,
            "run": config.get("name"),
            **{key: self.facts.get(key) for key in ("step", "run_tokens", "tokens", "lineage", "source")},
        }

    @cached_property
    def digest(self) -> str:
        """The seal's own hash, which stands for all files.

        Where nobody sealed them, a hash over the weights' files and the model as it was read: what says so may lie in
        another folder.
        """
        with reaching(self.checkpoint):
            if (self.checkpoint / SEAL).is_file():
                return seal_digest(self.checkpoint)
            files = sorted(path for path in weights_of(self.checkpoint).iterdir() if path.is_file())
            hashes = {path.name: hash_weights(path) for path in files}
        return hash_json([self.layout, self.model.model_dump(mode="json"), hashes])

    def require_intact(self) -> None:
        """Hold every file against the seal; a checkpoint of others may have none, one of ours must.

        Raises:
            CheckpointError: unsealed, or a file is missing, foreign or altered.
        """
        if self.layout == "octo" or (self.checkpoint / SEAL).is_file():
            verify_seal(self.checkpoint)

    def tensors(self) -> TensorSource:
        """The weights under megatron-core's names, one a layer, the vocabulary padded as our trainer pads it.

        Raises:
            CheckpointError: the list of tensors is missing or damaged.
        """
        from megatron_octo.checkpoint.dist import TorchDist, read_metadata

        weights = weights_of(self.checkpoint)
        places = places_of({name: facts.shape for name, facts in read_metadata(weights).items()})
        return _Repadded(TorchDist(weights, places), self.model.vocabulary)


def geometry(model: ModelConfig) -> Geometry:
    """Sizes of a model as our trainer pads it."""
    return Geometry.of(model, padded_vocabulary(model.vocabulary))


def find_checkpoint(path: Location) -> Location:
    """One checkpoint: a directory that is one, or the newest of a run directory, ours or Megatron's.

    Raises:
        CheckpointError: there is none, or one of a format that is not read.
        EnvironmentProblem: a remote directory cannot be reached.
    """
    with reaching(path):
        if path.name == WEIGHTS and layout_at(path.parent) == "nemo":
            return path.parent
        if _is_ours(path) or layout_at(path):
            return path
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory", fix="name a checkpoint or a run directory")
        _refuse_other_formats(path)
        if (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: a Hugging Face directory", "a checkpoint is needed here", "convert it: octo convert from-hf"
            )
        return _newest(path) if (path / TRACKER).is_file() else latest_checkpoint(path)


def weights_of(checkpoint: Location) -> Location:
    """The folder of a checkpoint that holds its torch_dist files.

    Raises:
        CheckpointError: no folder does.
    """
    with reaching(checkpoint):
        for layout in LAYOUTS.values():
            folder = checkpoint / layout.into if layout.into else checkpoint
            if (folder / LIST).is_file():
                return folder
    raise CheckpointError(f"{checkpoint / LIST}: no such file", "it lists the checkpoint's tensors")


def places_of(stored: Mapping[str, Shape]) -> dict[str, Place]:
    """Where tensors lie in a checkpoint, by the names megatron-core gives them when each layer has its own.

    Args:
        stored: shapes by stored name. A name without a layer's number is a stack of all layers; `module.` in front,
            which wrappers of a model add, does not count.
    """
    from megatron_octo.checkpoint.dist import Place

    places: dict[str, Place] = {}
    for name, shape in stored.items():
        plain = re.sub(r"^(module\.)+", "", name)
        if stack := _LAYER.fullmatch(plain):
            layers = {f"decoder.layers.{layer}.{stack[1]}": Place(name, layer) for layer in range((*shape, 0)[0])}
            places |= layers
        elif not _NOT_WEIGHTS.search(plain):
            places[plain] = Place(name)
    return places


def read_origin(checkpoint: Location) -> Origin:
    """Read what a checkpoint says about itself: its model, and its tokenizer where that is still there.

    Args:
        checkpoint: as `find_checkpoint` gives it.

    Raises:
        CheckpointError: nothing in it says which model it is of.
        ConfigError: the model is not one of ours.
    """
    with reaching(checkpoint):
        return _read_own(checkpoint) if (checkpoint / FACTS).is_file() else _read_foreign(checkpoint)


class _Repadded:
    """A source whose rows of the vocabulary are those our trainer has; rows of padding nobody stored are zeros.

    A tensor with fewer rows than there are tokens keeps its shape, so that it is refused and not filled up.
    """

    def __init__(self, source: TensorSource, vocabulary: int) -> None:
        self.where = source.where
        self._source, self._stored = source, dict(source.shapes())
        rows = padded_vocabulary(vocabulary)
        padded = {name: self._stored.get(name, (0,)) for name in (EMBEDDING, HEAD)}
        changed = {name: (rows, *shape[1:]) for name, shape in padded.items() if shape[0] >= vocabulary}
        kept = {name: shape for name, shape in self._stored.items() if not _NOT_WEIGHTS.search(name)}
        self._shapes = kept | changed

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, by name."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Dtype a tensor is stored in."""
        return self._source.dtype(name)

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read rows `start` to `start + len(out)` of a tensor into `out`."""
        stored = max(0, min(len(out), self._stored[name][0] - start))
        if stored:
            self._source.fill(name, start, out[:stored])
        out[stored:].zero_()


def _read_own(checkpoint: Location) -> Origin:
    facts, path = read_facts(checkpoint), checkpoint / FACTS
    config = section(facts, "config", path)
    values = config.get("model") or facts.get("model")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: says nothing about the model", "its sizes are needed to convert")
    named = section(config, "data", path).get("tokenizer") or facts.get("tokenizer")
    carried = checkpoint / HUGGING_FACE
    present = (carried / "tokenizer_config.json").is_file()
    tokenizer = carried if present else named_directory(named, f"{path}: tokenizer")
    model = parse_config(ModelConfig, values, str(path))
    return Origin(checkpoint, facts.get("layout", "octo"), model, tokenizer, facts)


def _read_foreign(checkpoint: Location) -> Origin:
    layout = layout_at(checkpoint)
    if layout is None:
        raise CheckpointError(f"{checkpoint / FACTS}: no such file", "every checkpoint says which run it belongs to")
    described = describe(checkpoint, layout)
    rows = _rows_of_embedding(weights_of(checkpoint))
    model = model_of(described.architecture, rows, _where_described(checkpoint, layout))
    return Origin(checkpoint, layout, model, described.tokenizer, {"step": described.step})


def _where_described(checkpoint: Location, layout: str) -> str:
    names = {"nemo": f"{CONTEXT}/model.yaml", "megatron-bridge": "run_config.yaml", "megatron-lm": "common.pt: args"}
    return f"{checkpoint}/{names[layout]}"


def _rows_of_embedding(weights: Location) -> int:
    from megatron_octo.checkpoint.dist import read_metadata

    stored = read_metadata(weights)
    for name, place in places_of({name: facts.shape for name, facts in stored.items()}).items():
        if name == EMBEDDING:
            return stored[place.name].shape[0]
    raise CheckpointError(f"{weights}: holds no {EMBEDDING}", "only language models with one embedding are converted")


def _newest(directory: Location) -> Location:
    """The checkpoint Megatron's own pointer names."""
    said, name = _pointed(directory)
    if name is not None and layout_at(directory / name):
        return directory / name
    if name is not None:
        _refuse_other_formats(directory / name)
    raise CheckpointError(
        f"{directory / TRACKER}: names {said[:40]!r}, and there is no such torch_dist checkpoint",
        fix="name the checkpoint's own directory",
    )


def _pointed(directory: Location) -> tuple[str, str | None]:
    """What Megatron's own pointer says, and the folder it means, if that can be one's name."""
    said = (directory / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if re.fullmatch(r"[0-9]{1,18}", said):
        return said, f"iter_{int(said):07d}"
    return said, said if said == "release" else None


def _is_ours(directory: Location) -> bool:
    """Whether a directory is a checkpoint with our seal or facts.

    One in Megatron's layout may have been trained on in place by Megatron, which then moves its pointer.
    """
    if not any((directory / name).is_file() for name in (SEAL, FACTS)):
        return False
    return not (directory / TRACKER).is_file() or _pointed(directory)[1] in {layout.into for layout in LAYOUTS.values()}


def _refuse_other_formats(directory: Location) -> None:
    """Name the Megatron formats that are not read, where one is seen."""
    names = _names(directory)
    seen = next((name for name in names if name.startswith("mp_rank_")), None)
    if seen or (LIST in names and FORMATS not in names):
        what = "a file for each rank ('torch')" if seen else "no list of formats ('fsdp_dtensor' or 'torch_dcp')"
        raise CheckpointError(
            f"{directory}: holds {what}",
            "only torch_dist is read",
            "load and save it once with --ckpt-format torch_dist",
        )


def _names(directory: Location) -> Iterable[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()

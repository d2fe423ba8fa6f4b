"""Model and optimizer state of a distributed run <-> torch_dist files, from any layout to any layout.

In the same layout a resumed run is bitwise the uninterrupted one. In another layout sums are taken in another
order: in fp32, losses stay within 1e-6 of the uninterrupted run over the steps tested (tests/distributed).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.core.fp8_utils import is_float8tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from megatron_octo.checkpoint.dist import read_metadata, stored_names
from megatron_octo.checkpoint.layer_state import check_layer_states
from megatron_octo.checkpoint.moments import places_without_gaps, values_as_they_are
from megatron_octo.checkpoint.part import BACKEND, COMMON, VERSION, Part
from megatron_octo.errors import CheckpointError
from megatron_octo.files import read_json

Chunks = list[torch.nn.Module]

_NO_CODE = "a checkpoint may hold values only; nothing that it names is called"


class Sharder:
    """Says for each save which part of the state this rank writes.

    Ranks that hold the same values share out the writing. How, and that all parts together are the whole state, is
    settled at the first save: the layout of a run does not change while it trains.

    Args:
        chunks: this rank's model chunks (one, or one per virtual pipeline stage).
        optimizer: Megatron's optimizer over them; None for weights only.
    """

    def __init__(self, chunks: Chunks, optimizer: Any) -> None:
        self._chunks, self._optimizer, self._settled = chunks, optimizer, False
        self._shares: Any = None
        if _data_ranks() > 1:
            self._shares = FullyParallelSaveStrategyWrapper(
                get_default_save_sharded_strategy(), _data_group(), do_cache_distribution=True
            )

    def part(self) -> Part:
        """This rank's part of the state as it is now; collective over all ranks. Values are not copied."""
        with values_as_they_are(self._optimizer):
            state = _describe(self._chunks, self._optimizer)
        sharded, common = save_preprocess(state, validate_access_integrity=not self._settled)
        if self._shares is not None:
            self._shares.apply_saving_parallelization(sharded)
        self._settled = True
        return Part(sharded, common)


def load_state(directory: Path, chunks: Chunks, optimizer: Any, *, moments: bool) -> None:
    """Read model weights and, if asked for, the optimizer's state; collective over all ranks.

    Args:
        directory: a checkpoint whose seal has been verified.
        chunks: this rank's model chunks, filled in place.
        optimizer: Megatron's optimizer over them. Without moments its master weights are taken from the model.
        moments: whether to read Adam's moments, step count and the fp32 master weights.

    Raises:
        CheckpointError: a tensor is absent, has another shape than the model's or no place in it, or what is stored
            names code.
    """
    _check_format(directory)
    _check_common(directory)
    wanted = _describe(chunks, optimizer if moments else None, loading=True)
    _drop_absent_objects(wanted, stored_names(directory))
    _check_all_have_a_place(directory, wanted)
    reader: Any = get_default_load_sharded_strategy(str(directory))
    if _data_ranks() > 1:
        reader = FullyParallelLoadStrategyWrapper(reader, _data_group())
    try:
        with _objects_without_code():
            loaded = dist_checkpointing.load(wanted, str(directory), reader)
    except (CheckpointingException, CheckpointException, KeyError) as error:
        raise _does_not_fit(directory, error) from error
    for index, chunk in enumerate(chunks):
        _give(directory, chunk, loaded[_chunk_key(index)])
    rounded = any(is_float8tensor(weight) for chunk in chunks for weight in chunk.parameters())
    if moments:
        optimizer.load_state_dict(loaded["optimizer"])
        if rounded:
            cast_from_masters(optimizer)
    else:
        # A model that keeps its weights in FP8 has rounded what it was given: masters come from what was read.
        optimizer.reload_model_params(loaded if rounded else None)


def _check_all_have_a_place(directory: Path, wanted: dict[str, Any]) -> None:
    """Refuse weights that no rank asks for: megatron-core would leave them out without a word."""
    places = [item.key for item in nested_values(wanted) if isinstance(item, ShardedTensor | ShardedTensorFactory)]
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, places)
    if left := sorted(read_metadata(directory).keys() - {key for keys in of_ranks for key in keys}):
        raise CheckpointError(
            f"{directory}: holds {len(left)} tensor{'s' * (len(left) > 1)} that this model has no place for: "
            f"{', '.join(left[:3])}{', ...' * (len(left) > 3)}",
            "a checkpoint loads into the model it was saved from, in any layout",
            "compare `octo convert show` with the model section of the run",
        )


def _give(directory: Path, chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Give a model chunk what was read; its layers would unpickle their own part of it."""
    try:
        check_layer_states(state)
    except pickle.UnpicklingError as error:
        raise _not_trusted(directory, str(error)) from None
    chunk.load_state_dict(state, strict=False)


def cast_from_masters(optimizer: Any) -> None:
    """Cast the model's weights from the optimizer's fp32 masters, as its last step did.

    Weights kept in FP8 are stored in BF16. Rounding them to FP8 again finds another scale than the step had, whose
    cast was of the masters; so a resumed run would not be bitwise the uninterrupted one.

    Args:
        optimizer: Megatron's distributed optimizer, its state loaded.
    """
    for one in optimizer.chained_optimizers:
        one._copy_main_params_to_model_params()
        for chunk in one.model_chunks:
            if not chunk.ddp_config.overlap_param_gather:  # otherwise the next forward pass gathers
                chunk.start_param_sync()


def _check_format(directory: Path) -> None:
    """Refuse a checkpoint of another format; megatron-core would look for who reads it, and fail in many ways."""
    path = directory / CONFIG_FNAME
    found, known = read_json(path), asdict(CheckpointingConfig(BACKEND, VERSION))
    if found != known:
        raise CheckpointError(
            f"{path}: {'no JSON here' if found is None else f'format {str(found)[:80]}'}",
            f"the trainer reads {known['sharded_backend']} of version {known['sharded_backend_version']}",
            "restore the file from a copy, or use another checkpoint",
        )


def _check_common(directory: Path) -> None:
    """Refuse common state that names code. megatron-core leaves that to torch, and torch to the environment."""
    path = directory / COMMON
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in every way there is
        reason = " ".join(str(error).split())[:200]
        raise _not_trusted(path, f"{type(error).__name__}: {reason}") from None


@contextmanager
def _objects_without_code() -> Iterator[None]:
    """While open, objects of a checkpoint (FP8 scaling state) are plain values; torch would run what they name."""
    plain = MCoreLoadPlanner.load_bytes

    def load_bytes(planner: Any, item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises at the first name of code, before torch runs any
        value.seek(0)
        plain(planner, item, value)

    MCoreLoadPlanner.load_bytes = load_bytes
    try:
        yield
    finally:
        MCoreLoadPlanner.load_bytes = plain


def state_bytes(chunks: Chunks) -> int:
    """Size in bytes of a full save of model and optimizer (a close upper bound); collective over all ranks."""
    adam = 3 * 4  # fp32 master weight and both moments, per parameter
    own = sum(parameter.numel() * (parameter.element_size() + adam) for c in chunks for parameter in c.parameters())
    device = next(chunks[0].parameters()).device
    total = torch.tensor(own if _data_rank() == 0 else 0, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def _describe(chunks: Chunks, optimizer: Any, *, loading: bool = False) -> dict[str, Any]:
    """The sharded state dict: which slice of which named global tensor this rank holds."""
    how = {
        "distrib_optim_sharding_type": "fully_reshardable",  # optimizer tensors in the shape of their parameters
        "non_homogeneous_layers": True,  # one key a layer, as in the model, and not one stacked tensor
        "dp_cp_group": _data_group(),
    }
    state = {_chunk_key(index): chunk.sharded_state_dict(metadata=how) for index, chunk in enumerate(chunks)}
    _drop_empty_objects(state)
    if optimizer is not None:
        models = dict(state)
        with places_without_gaps(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=loading, metadata=how)
    return state


def _chunk_key(index: int) -> str:
    return f"model{index}"


def _drop_empty_objects(state: dict[str, Any]) -> None:
    """Leave out extra state that says nothing: layers without FP8 keep an empty object each."""
    for chunk in state.values():
        for key in [key for key, value in chunk.items() if isinstance(value, ShardedObject) and _says_nothing(value)]:
            del chunk[key]


def _says_nothing(item: ShardedObject) -> bool:
    return item.data is None or (isinstance(item.data, torch.Tensor) and item.data.numel() == 0)


def _drop_absent_objects(state: dict[str, Any], stored: set[str]) -> None:
    """Do not ask for extra state the checkpoint lacks (it came from another precision, or from a conversion)."""
    for key, chunk in state.items():
        if key.startswith("model"):
            for name in [n for n, v in chunk.items() if isinstance(v, ShardedObject) and v.unique_key not in stored]:
                del chunk[name]


def _data_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _data_ranks() -> int:
    return torch.distributed.get_world_size(_data_group())


def _data_rank() -> int:
    return torch.distributed.get_rank(_data_group())


def _not_trusted(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be trusted ({reason})", _NO_CODE)


def _does_not_fit(directory: Path, error: BaseException) -> CheckpointError:
    lines = str(error).strip().strip("'\"").splitlines() or [type(error).__name__]
    detail = next((line for line in reversed(lines) if "mismatch" in line or "not in state" in line), lines[-1])
    return CheckpointError(
        f"{directory}: does not fit this model ({detail[:300]})",
        "a checkpoint loads into the model it was saved from, in any layout",
        "compare `octo convert show` with the model section of the run",
    )

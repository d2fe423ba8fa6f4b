"""From any layout to any other: saved in one, loaded in another, trained on; weights and moments as in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_octo.checkpoint.dist import TorchDist
from megatron_octo.checkpoint.store import latest_checkpoint
from megatron_octo.checkpoint.tensors import read
from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny_layouts import PAIRS, RESHARDED  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOLERANCE = 1e-6
BF16_LOSS, BF16_NORM = 2e-3, 2e-2
BEFORE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")
    for phases, nproc in (("save", 1), ("save", 2), ("save load", 4), ("load", 2), ("load", 1)):
        arguments = [phases, str(folder), str(nproc)]
        launch("reshard_worker", arguments, nproc, folder / "logs", 1, environment={"PYTHONPATH": str(HERE)})
    return folder


def steps(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def away(mine: list[dict], theirs: list[dict]) -> tuple[float, float]:
    pairs = list(zip(mine, theirs, strict=True))
    loss = max(abs(one["loss"] - other["loss"]) for one, other in pairs)
    return loss, max(abs(one["norm"] - other["norm"]) / other["norm"] for one, other in pairs)


@pytest.mark.parametrize(("source", "name"), PAIRS, ids=[f"{source} to {name}" for source, name in PAIRS])
def test_training_goes_on_in_any_layout(folder, source, name):
    bf16 = RESHARDED[name]["kind"] == "bf16"
    whole = steps(folder, "whole bf16" if bf16 else "whole")
    loss, norm = away(steps(folder, f"{source} to {name}"), whole[BEFORE:])
    assert loss < (BF16_LOSS if bf16 else TOLERANCE)
    assert norm < (BF16_NORM if bf16 else TOLERANCE)


def test_lost_moments_would_be_seen(folder):
    loss, norm = away(steps(folder, "no moments"), steps(folder, "whole")[BEFORE:])
    assert loss > 100 * TOLERANCE
    assert norm > 100 * TOLERANCE


def stored(folder: Path, name: str) -> dict:
    """What a layout's checkpoint holds: weights, and Adam's moments of every parameter."""
    source = TorchDist(latest_checkpoint(folder / name), optimizer=True)
    wanted = [key for key in source.shapes() if "optimizer" not in key or ".exp_avg" in key]
    return {key: read(source, key) for key in wanted}


@pytest.mark.parametrize("name", [name for name, values in RESHARDED.items() if values["kind"] == "fp32"])
def test_every_layout_saves_the_same_weights_and_moments(folder, name):
    """Also with overlap_param_gather, where after a step a rank has only its own share of the new weights."""
    mine, single = stored(folder, name), stored(folder, "single")
    assert mine.keys() == single.keys()
    assert sum(".exp_avg_sq." in key for key in mine) == sum("optimizer" not in key for key in mine)
    for key, tensor in mine.items():
        largest = single[key].abs().max()
        assert (tensor - single[key]).abs().max() <= 1e-4 * largest, key

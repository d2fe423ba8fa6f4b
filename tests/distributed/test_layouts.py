"""Every layout trains the same model: losses and gradient norms of real processes against one process.

All start from the random weights of one seed, drawn anew in each layout.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny_layouts import case, overlaps, reduces  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

UNTIED = {"model": {"tied_embeddings": False}}
QWEN2, QWEN3 = ({"model": {"family": family, "kv_groups": 2}} for family in ("qwen2", "qwen3"))
SMALL = {"model": {"vocabulary": 50}}  # padded to 128: with TP2 one rank holds nothing but padding
BF16 = {**SMALL, "dtype": "bf16"}
PLAIN = {"distributed_optimizer": False}
ONES = {"batch": {"micro_batch": 1}}  # 8 micro-batches a step instead of 4

SINGLE = {
    "single": {},
    "single untied": UNTIED,
    "single bf16": BF16,
    "single small vocabulary": SMALL,
    "single plain optimizer": {"parallel": PLAIN},
    "single qwen2": QWEN2,
    "single qwen3": QWEN3,
    "single micro-batch 1": ONES,
    "single selective": {"recompute": {"kind": "selective"}},
    "single full uniform": {"recompute": {"kind": "full", "layers": 2}},
    "single full block": {"recompute": {"kind": "full", "method": "block", "layers": 3}},
}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
TWO = {
    "TP2": ({"parallel": {"tensor": 2}}, "single"),
    "TP2 SP": ({"parallel": {"tensor": 2, "sequence": True}}, "single"),
    "TP2 SP untied": ({"parallel": {"tensor": 2, "sequence": True}, **UNTIED}, "single untied"),
    "PP2": ({"parallel": {"pipeline": 2}}, "single"),
    "PP2 untied": ({"parallel": {"pipeline": 2}, **UNTIED}, "single untied"),
    "PP2 VPP2": ({"parallel": VIRTUAL}, "single"),
    "DP2": ({"parallel": {"data": 2}, **ONES}, "single"),
    "DP2 plain optimizer": ({"parallel": {"data": 2, **PLAIN}}, "single plain optimizer"),
    "DP2 plain optimizer, reduce overlapped": ({"parallel": {"data": 2, **PLAIN, **reduces}}, "single"),
    "DP2 overlapped": ({"parallel": {"data": 2, **overlaps}}, "single"),
    "DP2 bf16 overlapped": ({"parallel": {"data": 2, **overlaps}, **BF16}, "single bf16"),
    "CP2": ({"parallel": {"context": 2}}, "single"),
    "CP2 selective": ({"parallel": {"context": 2, **overlaps}, "recompute": {"kind": "selective"}}, "single"),
    "TP2 small vocabulary": ({"parallel": {"tensor": 2}, **SMALL}, "single small vocabulary"),
    "TP2 SP bf16": ({"parallel": {"tensor": 2, "sequence": True}, **BF16}, "single bf16"),
}
CUT = {"tensor": 2, "pipeline": 2, "sequence": True}
FOUR = {
    "TP2 PP2 SP": ({"parallel": CUT}, "single"),
    "TP2 PP2 SP qwen2": ({"parallel": CUT, **QWEN2}, "single qwen2"),
    "TP2 PP2 SP qwen3": ({"parallel": CUT, **QWEN3}, "single qwen3"),
    # More ranks than KV groups: two ranks share a key, its bias and its norm.
    "TP4 SP qwen2": ({"parallel": {"tensor": 4, "sequence": True}, **QWEN2}, "single qwen2"),
    "TP4 qwen3": ({"parallel": {"tensor": 4}, **QWEN3}, "single qwen3"),
    "PP4": ({"parallel": {"pipeline": 4}, "recompute": {"kind": "full"}}, "single"),
    "PP2 VPP2 DP2 overlapped": ({"parallel": {**VIRTUAL, "data": 2, **overlaps}}, "single"),
    "PP2 VPP2 DP2 bf16": ({"parallel": {**VIRTUAL, "data": 2, **overlaps}, **BF16}, "single bf16"),
    "TP2 PP2 VPP2 SP full block": (
        {
            "parallel": {**VIRTUAL, "tensor": 2, "sequence": True},
            "recompute": {"kind": "full", "method": "block"},
        },
        "single",
    ),
    # Tied embeddings lie in different places of the first and the last stage's gradient buffers.
    "PP2 DP2": ({"parallel": {"pipeline": 2, "data": 2, **overlaps}}, "single"),
    "TP2 DP2 SP full uniform": (
        {
            "parallel": {"tensor": 2, "data": 2, "sequence": True, **overlaps},
            "recompute": {"kind": "full", "layers": 2},
        },
        "single",
    ),
    "CP2 TP2 SP": ({"parallel": {"context": 2, "tensor": 2, "sequence": True}}, "single"),
    "CP2 DP2": ({"parallel": {"context": 2, "data": 2, **overlaps}}, "single"),
    "CP2 PP2 untied": ({"parallel": {"context": 2, "pipeline": 2}, **UNTIED}, "single untied"),
}

LOSS = NORM = 1e-6
"""fp32: the loss a token, and the gradient norm relative to itself."""
BF16_LOSS, BF16_NORM = 2e-3, 2e-2
"""bf16 keeps 8 bits: moving each initial weight to a neighbouring number moves loss and norm as far in three steps."""


def run(cases: dict[str, dict], nproc: int, folder: Path, look: str | None = None) -> dict[str, list]:
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps({name: case(**over).dump() for name, over in cases.items()}))
    arguments = [str(folder / "cases.json"), str(folder), *([look] if look else [])]
    launch("layout_worker", arguments, nproc, folder, threads=1, environment={"PYTHONPATH": str(HERE)})
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in [*cases, *([look] if look else [])]}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    found = run(SINGLE, 1, root / "one", "recompute")
    found |= run({name: over for name, (over, _) in TWO.items()}, 2, root / "two", "overlap")
    found |= run({name: over for name, (over, _) in FOUR.items()}, 4, root / "four")
    record(found)
    return found


def away(one: list, other: list) -> dict[str, float]:
    """Largest difference over the steps: of the loss, and of the gradient norm relative to itself."""
    pairs = list(zip(one, other, strict=True))
    return {
        "loss": max(abs(mine["loss"] - theirs["loss"]) for mine, theirs in pairs),
        "norm": max(abs(mine["norm"] - theirs["norm"]) / theirs["norm"] for mine, theirs in pairs),
    }


def record(found: dict[str, list]) -> None:
    figures = {name: away(found[name], found[reference]) for name, (_, reference) in {**TWO, **FOUR}.items()}
    print(json.dumps(figures, indent=1))
    if os.environ.get("OCTO_FIGURES"):
        target = Path(os.environ["OCTO_FIGURES"]) / "layouts.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(figures, indent=1))


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_layout_equals_one_process(results, name):
    over, reference = {**TWO, **FOUR}[name]
    loss, norm = (BF16_LOSS, BF16_NORM) if "dtype" in over else (LOSS, NORM)
    found = away(results[name], results[reference])
    assert found["loss"] < loss, found
    assert found["norm"] < norm, found


@pytest.mark.parametrize("name", ["single selective", "single full uniform", "single full block"])
def test_recomputation_changes_no_bit(results, name):
    assert results[name] == results["single"]


def test_recomputation_happens(results):
    layers, batches = 4, 2
    assert results["recompute"] == {
        "none": {"layer": layers * batches, "attention": layers * batches},
        "selective": {"layer": layers * batches, "attention": 2 * layers * batches},
        "full": {"layer": 2 * layers * batches, "attention": 2 * layers * batches},
        "block": {"layer": (layers + 3) * batches, "attention": (layers + 3) * batches},
    }


def test_the_cut_of_a_batch_changes_nothing(results):
    assert away(results["single micro-batch 1"], results["single"])["loss"] < LOSS


def test_messages_are_under_way_while_layers_compute(results):
    assert results["overlap"]["without"] == {"buckets": 1, "gather": 0, "reduce": 0}
    seen = results["overlap"]["with"]
    assert seen["buckets"] > 4
    assert seen["gather"] >= 2
    assert 2 <= seen["reduce"] <= 4  # of four layers: only in the last micro-batch


def test_overlapped_gradients_do_not_hang_on_the_number_of_micro_batches(results):
    """megatron-core learns in its first step how many gradients a bucket waits for."""
    found = away(results["overlap"]["other count"], results["single"])
    assert found["loss"] < LOSS
    assert found["norm"] < NORM  # half of it, and no error, where reductions begin a micro-batch too early


@pytest.mark.parametrize("name", SINGLE)
def test_training_learns(results, name):
    losses = [step["loss"] for step in results[name]]
    assert all(math.isfinite(loss) for loss in losses)
    vocabulary = SINGLE[name].get("model", {}).get("vocabulary", 200)
    assert losses[0] == pytest.approx(math.log(vocabulary), abs=0.1)  # padding takes no probability
    assert losses[-1] < losses[0] - 0.1

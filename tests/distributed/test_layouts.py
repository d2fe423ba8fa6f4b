"""Every layout trains the same model: losses and gradient norms of real processes against one process."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
TIED, UNTIED = {"tied_embeddings": True}, {"tied_embeddings": False}
QWEN2, QWEN3 = {"family": "qwen2", "kv_groups": 2}, {"family": "qwen3", "kv_groups": 2}
SHORT = 3  # steps: a norm over eight values magnifies rounding, twentyfold by the fifth step
SMALL = {"vocabulary": 50}  # padded to 128: with TP2 one rank holds nothing but padding

SINGLE = {
    "single": {"model": TIED},
    "single untied": {"model": UNTIED},
    "single bf16": {"model": SMALL, "dtype": "bf16"},
    "single small vocabulary": {"model": SMALL},
    "single plain optimizer": {"model": TIED, "parallel": {"distributed_optimizer": False}},
    "single qwen2": {"model": QWEN2, "steps": SHORT},
    "single qwen3": {"model": QWEN3, "steps": SHORT},
}
TWO = {
    "TP2": ({"parallel": {"tensor": 2}}, "single"),
    "TP2 SP": ({"parallel": {"tensor": 2, "sequence": True}}, "single"),
    "TP2 SP untied": ({"parallel": {"tensor": 2, "sequence": True}, "model": UNTIED}, "single untied"),
    "PP2": ({"parallel": {"pipeline": 2}}, "single"),
    "PP2 untied": ({"parallel": {"pipeline": 2}, "model": UNTIED}, "single untied"),
    "PP2 VPP2": ({"parallel": {"pipeline": 2, "virtual_pipeline": 2}}, "single"),
    "DP2": ({"parallel": {"data": 2}}, "single"),
    "DP2 plain optimizer": ({"parallel": {"data": 2, "distributed_optimizer": False}}, "single plain optimizer"),
    "CP2": ({"parallel": {"context": 2}}, "single"),
    "TP2 small vocabulary": ({"parallel": {"tensor": 2}, "model": SMALL}, "single small vocabulary"),
    "TP2 SP bf16": ({"parallel": {"tensor": 2, "sequence": True}, "model": SMALL, "dtype": "bf16"}, "single bf16"),
}
CUT = {"tensor": 2, "pipeline": 2, "sequence": True}
FOUR = {
    "TP2 PP2 SP": ({"parallel": CUT}, "single"),
    "TP2 PP2 SP qwen2": ({"parallel": CUT, "model": QWEN2, "steps": SHORT}, "single qwen2"),
    "TP2 PP2 SP qwen3": ({"parallel": CUT, "model": QWEN3, "steps": SHORT}, "single qwen3"),
    # More ranks than KV groups: two ranks share a key, its bias and its norm.
    "TP4 qwen2": ({"parallel": {"tensor": 4}, "model": QWEN2, "steps": SHORT}, "single qwen2"),
    "TP4 qwen3": ({"parallel": {"tensor": 4}, "model": QWEN3, "steps": SHORT}, "single qwen3"),
}

FP32_TOLERANCE = 2e-6
BF16_TOLERANCE = 5e-2  # rounding to 8 bits, grown over five steps; the first loss is held to 1e-3


def run(cases: dict[str, dict], nproc: int, folder: Path) -> dict[str, dict]:
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(
        "layout_worker",
        [str(folder / "cases.json"), str(folder)],
        nproc,
        folder,
        threads=1,
        environment={"PYTHONPATH": str(HERE)},
    )
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    found = run(SINGLE, 1, root / "one")
    found |= run({name: case for name, (case, _) in TWO.items()}, 2, root / "two")
    found |= run({name: case for name, (case, _) in FOUR.items()}, 4, root / "four")
    record(found)
    return found


def difference(one: dict, other: dict, what: str) -> float:
    return max(abs(mine - theirs) for mine, theirs in zip(one[what], other[what], strict=True))


def record(found: dict[str, dict]) -> None:
    figures = {
        name: {what: difference(found[name], found[reference], what) for what in ("losses", "norms")}
        for name, (_, reference) in {**TWO, **FOUR}.items()
    }
    print(json.dumps(figures, indent=1))
    if os.environ.get("OCTO_FIGURES"):
        target = Path(os.environ["OCTO_FIGURES"]) / "layouts.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(figures, indent=1))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_layout_equals_one_process(results, name):
    case, reference = {**TWO, **FOUR}[name]
    tolerance = BF16_TOLERANCE if case.get("dtype") == "bf16" else FP32_TOLERANCE
    assert difference(results[name], results[reference], "losses") < tolerance
    assert abs(results[name]["losses"][0] - results[reference]["losses"][0]) < 1e-3
    assert difference(results[name], results[reference], "norms") < tolerance * max(results[reference]["norms"])


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", SINGLE)
def test_training_learns(results, name):
    losses = results[name]["losses"]
    assert all(math.isfinite(loss) for loss in losses)
    vocabulary = SINGLE[name]["model"].get("vocabulary", 200)
    assert losses[0] == pytest.approx(math.log(vocabulary), abs=0.1)  # padding takes no probability
    assert losses[-1] < losses[0] - 0.2

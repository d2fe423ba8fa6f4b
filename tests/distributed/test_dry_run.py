"""What a dry run says of every rank, against what real ranks hold after they were set up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_octo.runtime.launch import launch
from megatron_octo.train.api import load_run
from megatron_octo.train.dry_run import dry_run

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny_run import write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SIZE = "model={layers: 4, hidden: 64, heads: 8, kv_groups: 4, ffn: 176, vocabulary: 91}"  # padded to 128
CASES = {
    "tied, every axis": [SIZE, "dtype=bf16", "parallel={tensor: 2, pipeline: 2, sequence: true}"],
    "untied, shared moments": [SIZE, "dtype=bf16", "model.tied_embeddings=false", "parallel={tensor: 2, data: 2}"],
    "interleaved, fp32": [SIZE, "batch.micro_batch=1", "parallel={pipeline: 2, virtual_pipeline: 2, data: 2}"],
    "qwen3, own moments": [SIZE, "dtype=bf16", "model.family=qwen3",
                           "parallel={tensor: 2, context: 2, distributed_optimizer: false}"],
}  # fmt: skip
PADDING = 1.02  # megatron-core rounds buffers and shards up


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict]]]:
    folder = tmp_path_factory.mktemp("bytes")
    run = write_run(folder)
    (folder / "cases.json").write_text(json.dumps(CASES))
    arguments = [str(run), str(folder / "cases.json"), str(folder)]
    launch("bytes_worker", arguments, 4, folder / "logs", 1, environment={"PYTHONPATH": str(HERE)})
    found = {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(4)] for name in CASES}
    return run, found


@pytest.mark.parametrize("name", CASES)
def test_real_ranks_hold_what_the_dry_run_says(ranks: tuple[Path, dict[str, list[dict]]], name: str) -> None:
    run, found = ranks
    said = dry_run(load_run(run, CASES[name]))
    for rank in found[name]:
        stage = said["stages"][rank["stage"]]
        assert (rank["parameters"], rank["weights"]) == (stage["parameters"], stage["weights"])
        for part in ("gradients", "optimizer"):
            assert stage[part] <= rank[part] * 1.001 and rank[part] < stage[part] * PADDING + 4096, (part, rank, stage)
    whole = sum(rank["parameters"] for rank in found[name])
    assert whole >= said["parameters"]["published"] + said["parameters"]["padding"]

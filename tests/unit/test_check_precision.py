"""FP8 and the layers it needs: what would be ignored or fail in the first step is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from precision_tools import RUN, run

from megatron_octo.config.check import check_run
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
def test_each_recipe_and_format_passes(recipe, form):
    check_run(run(fp8={"recipe": recipe, "format": form, "parameters": True, "sentinel": {}}))


def test_what_goes_together_passes():
    check_run(run(fp8={"bf16_first_layers": 1, "bf16_last_layers": 1, "attention": True}))
    check_run(run(fp8={"recipe": "delayed", "margin": 1, "amax_history": 16, "amax": "most_recent", "attention": True}))
    check_run(run(parallel={"tensor": 2, "sequence": True, "tp_comm_overlap": True}))
    # More tensor-parallel ranks than KV groups: each multiplies an equal part of the columns all the same.
    check_run(run(model={**RUN["model"], "kv_groups": 2}, parallel={"tensor": 4}))


REFUSED = {
    "fp32": ({"dtype": "fp32"}, "dtype is fp32"),
    "local layers": ({"transformer_impl": "local"}, "transformer_impl is local"),
    "margin": ({"fp8": {"margin": 1}}, "fp8.margin = 1 with fp8.recipe = tensorwise"),
    "history": ({"fp8": {"recipe": "blockwise", "amax_history": 16}}, "fp8.amax_history = 16 with fp8.recipe"),
    "amax": ({"fp8": {"amax": "most_recent"}}, "fp8.amax = most_recent"),
    "wgrad": ({"fp8": {"recipe": "delayed", "wgrad": False}}, "fp8.wgrad = false"),
    "blockwise attention": ({"fp8": {"recipe": "blockwise", "attention": True}}, "no FP8 attention"),
    "delayed BF16 layers": ({"fp8": {"recipe": "delayed", "bf16_last_layers": 1}}, "fp8.recipe = delayed"),
    "no layer left": ({"fp8": {"bf16_first_layers": 4, "bf16_last_layers": 4}}, "8 of 8 layers in BF16"),
    "more than a stage": (
        {"fp8": {"bf16_first_layers": 3}, "parallel": {"pipeline": 4}},
        "bf16_first_layers = 3 is more than the 2 layers of a pipeline stage",
    ),
    "parameters alone": (
        {"fp8": {"parameters": True}, "parallel": {"distributed_optimizer": False}},
        "without parallel.distributed_optimizer",
    ),
    "short sequence": (
        {"data": {**RUN["data"], "sequence_length": 24}},
        "sequence_length per rank = 24 is not divisible by 16",
    ),
    "ffn": ({"model": {**RUN["model"], "ffn": 520}}, "model.ffn / parallel.tensor = 520"),
    "heads": ({"model": {**RUN["model"], "heads": 4, "head_dim": 6}}, "attention width .* = 24"),
    "groups": ({"model": {**RUN["model"], "head_dim": 2, "kv_groups": 1}}, "query, key and value width .* = 20"),
    "groups of several ranks": (
        {"model": {**RUN["model"], "heads": 4, "head_dim": 16, "kv_groups": 1}, "parallel": {"tensor": 4}},
        "query, key and value width .* = 24",
    ),
    "blocks of a gather": (
        {"fp8": {"recipe": "blockwise"}, "parallel": {"tensor": 4, "sequence": True}},
        "per rank = 64 is not divisible by 128",
    ),
    "overlap of blocks": (
        {"fp8": {"recipe": "blockwise"}, "parallel": {"tensor": 2, "sequence": True, "tp_comm_overlap": True}},
        "hold no block-scaled tensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_or_fail_later_is_refused(name):
    changes, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as refused:
        check_run(run(**changes))
    assert "fix: " in str(refused.value)


def test_the_defaults_that_are_compared_are_the_fields_own(tmp_path: Path):
    """A resolved configuration, in which every field is written out, passes as the short one did."""
    check_run(RunConfig.model_validate(run().model_dump(mode="json")))

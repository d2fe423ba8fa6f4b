"""TransformerEngine's layers compute what our local ones and transformers do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.model import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

MODEL = {"layers": 3, "hidden": 256, "heads": 4, "kv_groups": 2, "ffn": 512, "vocabulary": 384}
FAMILIES = ("llama", "qwen2", "qwen3")
# Relative root-mean-square difference of BF16 logits from those of transformers in fp32. On a CPU the local layers,
# which agree in fp32 to 1e-6 (tests/parity), measure 1.2e-2, 1.7e-2 and 1.9e-2 here: rounding alone.
TOLERANCE = 3e-2


@pytest.fixture(scope="module", autouse=True)
def world():
    from megatron_octo.runtime import groups

    groups.initialize_single(seed=1)
    yield
    groups.shutdown(keep_world=True)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_both_specs_and_of_transformers(family):
    from test_transformers import Weights, reference, translated

    from megatron_octo.convert.rules import Geometry
    from megatron_octo.convert.tables import table_of
    from megatron_octo.convert.views import AsMegatron
    from megatron_octo.model.build import build_gpt
    from megatron_octo.model.translate import Kernels, padded_vocabulary

    model = ModelConfig(family=family, **MODEL)
    theirs = reference(model)
    local_names = translated(theirs.state_dict(), model)
    size = Geometry.of(model, padded_vocabulary(model.vocabulary))
    engine_names = list(AsMegatron(table_of(family), size, Weights(theirs.state_dict())).shapes())
    tokens = torch.randint(0, model.vocabulary, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
    logits = {}
    for layers, names in (("local", list(local_names)), ("transformer_engine", engine_names)):
        ours = build_gpt(
            model, ParallelConfig(), "bf16", pre_process=True, post_process=True, seed=None, kernels=Kernels(layers)
        )
        weights = dict(zip(names, local_names.values(), strict=True))
        loaded = ours.load_state_dict(weights, strict=False)
        assert not loaded.unexpected_keys
        assert all("_extra_state" in key for key in loaded.missing_keys)
        ours = ours.cuda().bfloat16().eval()
        positions = torch.arange(tokens.shape[1], device="cuda").expand(2, -1)
        with torch.no_grad():
            logits[layers] = ours(tokens.cuda(), positions, None)[..., : model.vocabulary].cpu()
        assert difference(logits[layers], expected) < TOLERANCE
    assert difference(logits["transformer_engine"], logits["local"]) < TOLERANCE

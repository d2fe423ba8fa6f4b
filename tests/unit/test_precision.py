"""Moving a layer to BF16: for good, for a while, and without a trace in what a recipe remembers."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from megatron_octo.model.precision import Precision


class Layer(torch.nn.Module):
    """Says in which precision it ran, and remembers as the delayed recipe does."""

    def __init__(self, number: int, world: SimpleNamespace) -> None:
        super().__init__()
        self.layer_number, self.world = number + 1, world
        state = {"scale": torch.ones(2), "amax_history": torch.zeros(4, 2)}
        self.inner = torch.nn.Identity()
        self.inner.fp8_meta = {"scaling_fwd": SimpleNamespace(**state), "scaling_bwd": SimpleNamespace(scale=1.0)}

    def forward(self, value):
        if self.world.fp8:
            self.inner.fp8_meta["scaling_fwd"].scale += 1
            self.inner.fp8_meta["scaling_fwd"].amax_history += 1
        return (*value, "fp8" if self.world.fp8 else "bf16")


@pytest.fixture
def precision():
    world = SimpleNamespace(fp8=True)

    @contextmanager
    def switch():
        world.fp8 = False
        try:
            yield
        finally:
            world.fp8 = True

    models = [SimpleNamespace(decoder=SimpleNamespace(layers=[Layer(number, world)])) for number in (0, 1, 2)]
    for model in models:
        model.modules = model.decoder.layers[0].modules
    made = Precision(models, switch)
    made.world = world
    return made


def ran(precision: Precision) -> list[str]:
    return [layer(())[0] for layer in precision.layers.values()]


def test_layers_move_for_good_and_for_a_while(precision):
    assert list(precision.layers) == [0, 1, 2]
    assert ran(precision) == ["fp8"] * 3
    precision.keep_in_bf16([1, 7])  # 7 is another rank's
    assert ran(precision) == ["fp8", "bf16", "fp8"]
    with precision.replay([2]):
        assert ran(precision) == ["fp8", "bf16", "bf16"]
    assert ran(precision) == ["fp8", "bf16", "fp8"]
    precision.keep_in_bf16([])
    assert ran(precision) == ["fp8"] * 3


def test_a_replay_puts_back_scales_and_maxima_even_when_it_fails(precision):
    ran(precision)
    states = [layer.inner.fp8_meta["scaling_fwd"] for layer in precision.layers.values()]
    before = [(state.scale.clone(), state.amax_history.clone(), state.scale.data_ptr()) for state in states]
    with pytest.raises(RuntimeError, match="out of memory"), precision.replay([0]):
        ran(precision)
        assert not torch.equal(states[1].scale, before[1][0])
        raise RuntimeError("out of memory")
    for state, (scale, history, place) in zip(states, before, strict=True):
        assert torch.equal(state.scale, scale)
        assert torch.equal(state.amax_history, history)
        assert state.scale.data_ptr() == place  # TransformerEngine holds views of it
    assert ran(precision) == ["fp8"] * 3


def test_a_failing_layer_leaves_the_switch_as_it_was(precision):
    precision.keep_in_bf16([0])
    with pytest.raises(TypeError):
        precision.layers[0](None)
    assert precision.world.fp8


def test_the_master_of_a_weight_in_fp8_is_the_drawn_value_and_not_its_rounding():
    """TransformerEngine remembers a weight before rounding it; what it remembers must be what was drawn."""
    from megatron_octo.config.model import ModelConfig
    from megatron_octo.model.initialise import _draw

    model = ModelConfig(layers=2, hidden=32, heads=4, kv_groups=2, ffn=64, vocabulary=91)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    plain, kept = (torch.zeros(32, 64, dtype=torch.bfloat16) for _ in range(2))
    kept._high_precision_init_val = torch.full((32, 64), 7.0)
    for weight in (plain, kept):
        _draw(weight, name, model, 1, (0, 1))
    assert plain.any()
    assert torch.equal(kept._high_precision_init_val, plain)
    assert not hasattr(plain, "_high_precision_init_val")

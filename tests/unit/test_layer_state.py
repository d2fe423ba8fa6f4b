"""The state of FP8 layers is read as values before TransformerEngine unpickles it; the layer itself is on no CPU."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from megatron_octo.checkpoint.layer_state import check_layer_states

KEY = "decoder.layers.0.mlp.linear_fc1._extra_state"


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    HYBRID = _FormatHelper(448.0, 57344.0)


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_compute_algo: Any = "max"


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes under the names that TransformerEngine's have, so that a pickle names them."""
    module = ModuleType("transformer_engine.common.recipe")
    for kind in (_FormatHelper, Format, DelayedScaling):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def as_tensor(content: bytes, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype)


def stored(**changes: Any) -> torch.Tensor:
    """What TransformerEngine 2.11 keeps of a layer with delayed scaling."""
    state = {
        "recipe": DelayedScaling(), "scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(16, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "kept": (1, [2.0, None], torch.bfloat16)},
    }  # fmt: skip
    return as_tensor(pickle.dumps({**state, **changes}))


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Nested:
    """Values of a tensor that are a file of `torch.save`, and that one holds the trap."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        import io

        file = io.BytesIO()
        torch.save(Trap(self.path), file)
        return torch.storage._load_from_bytes, (file.getvalue(),)


def test_an_honest_state_passes():
    check_layer_states({KEY: stored(), "b._extra_state": torch.empty(0, dtype=torch.uint8), "c._extra_state": None})
    check_layer_states({"weight": torch.ones(3)})


@pytest.mark.parametrize("kind", [Trap, Nested])
def test_a_call_is_not_made(tmp_path, kind):
    state = stored(scale_bwd=kind(tmp_path / "sprung"))
    with pytest.raises(pickle.UnpicklingError, match=KEY):
        check_layer_states({KEY: state})
    assert not (tmp_path / "sprung").exists()
    pickle.loads(state.numpy().tobytes())
    assert (tmp_path / "sprung").exists(), "the state would have done harm"


def test_another_dtype_hides_nothing(tmp_path):
    content = pickle.dumps(Trap(tmp_path / "sprung"))
    with pytest.raises(pickle.UnpicklingError, match=r"it names pathlib"):
        check_layer_states({KEY: as_tensor(content + b"." * (-len(content) % 4), torch.float32)})


@pytest.mark.parametrize(
    "state",
    [
        {"recipe": DelayedScaling(amax_compute_algo=torch.storage._load_from_bytes)},
        {"recipe": _FormatHelper},
        {"extra_fp8_variables": {"key": (torch._utils._rebuild_tensor_v2,)}},
        {"extra_fp8_variables": {torch.storage._load_from_bytes: 1}},
    ],
)
def test_a_function_does_not_stay_in_it(state):
    with pytest.raises(pickle.UnpicklingError, match="it holds"):
        check_layer_states({KEY: stored(**state)})


def test_a_function_among_the_values_of_a_new_object_is_seen():
    helper, function = "ctransformer_engine.common.recipe\n_FormatHelper\n", "ctorch.storage\n_load_from_bytes\n"
    content = b"\x80\x02" + helper.encode() + function.encode() + b"K\x01\x86\x81."  # _FormatHelper.__new__(f, 1)
    assert pickle.loads(content).max_fwd is torch.storage._load_from_bytes
    with pytest.raises(pickle.UnpicklingError, match="it holds"):
        check_layer_states({KEY: as_tensor(content)})


@pytest.mark.parametrize(
    ("owner", "name", "passes"),
    [("Format", "HYBRID", True), ("Format", "__class__", False), ("DelayedScaling", "__init__", False)],
)
def test_only_a_format_is_asked_for_by_name(owner, name, passes):
    """Enumerations are pickled so by some versions of Python; `__init__.__globals__` leads to everything."""
    content = b"\x80\x02cbuiltins\ngetattr\nctransformer_engine.common.recipe\n%b\nX%b%b\x86R."
    state = as_tensor(content % (owner.encode(), len(name).to_bytes(4, "little"), name.encode()))
    assert pickle.loads(state.numpy().tobytes()) == getattr({"Format": Format}.get(owner, DelayedScaling), name)
    if passes:
        check_layer_states({KEY: state})
        return
    with pytest.raises(pickle.UnpicklingError, match=f"it asks for an attribute '{name}'"):
        check_layer_states({KEY: state})


def test_nothing_is_set_on_a_function():
    content = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb."  # f.__dict__["a"] = 1
    with pytest.raises(pickle.UnpicklingError, match=KEY):
        check_layer_states({KEY: as_tensor(content)})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (as_tensor(b"no pickle"), "."),
        (torch.ones(3), "."),
        (b"bytes", "it is bytes and not a tensor"),
        (stored()[:-20], "."),
    ],
)
def test_what_is_no_such_state_is_refused(value, said):
    with pytest.raises(pickle.UnpicklingError, match=f"{KEY}: {said}"):
        check_layer_states({KEY: value})

"""What layers keep beside their weights: TransformerEngine's FP8 scales, as bytes of a pickle, looked at before it is.

TransformerEngine (2.11, `set_extra_state`) takes the bytes of a tensor and unpickles them with no limit, so a stored
tensor may run whatever its bytes name. Here they are read first, by an unpickler that finds stand-ins in place of the
few names such a state has, and nothing else: what passes names no other class or function when it is unpickled again.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any, Self

import torch

_MARK = "_extra_state"
_RECIPES = (
    "_FormatHelper", "MMParams", "QParams", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling",
    "MXFP8BlockScaling",
)  # fmt: skip
_VALUES = {
    *(("transformer_engine.common.recipe", name) for name in _RECIPES),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}
_FORMATS = ("E2M1", "E4M3", "E5M2", "HYBRID")
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


def check_layer_states(state: Mapping[str, Any]) -> None:
    """Check what is to be given to layers as their extra state.

    Args:
        state: a module's state dict; only keys of extra state are looked at.

    Raises:
        UnpicklingError: one holds more than scales and recipes, or its bytes are no such state; names the layer.
    """
    for name, value in state.items():
        if _MARK in name and value is not None:
            try:
                _check(value)
            except Exception as error:  # a damaged pickle fails in every way there is
                raise pickle.UnpicklingError(f"{name}: {str(error) or type(error).__name__}") from None


def _check(value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise pickle.UnpicklingError(f"it is {type(value).__name__} and not a tensor")
    if value.numel():  # an empty one says: no FP8
        _check_plain(_Reader(io.BytesIO(value.detach().cpu().numpy().tobytes())).load())


class _Values:
    """Stands for an object that only holds values: a recipe, a format, a tensor."""

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Keep the values here: a pickle may make an object without initialising it."""
        self = super().__new__(cls)
        self.parts = [arguments, named]
        return self

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        self.parts: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)


class _Format(_Values):
    """Stands for the enumeration of FP8 formats."""


class _Member:
    """Stands for `getattr`, by which some versions of Python pickle a member of an enumeration."""

    __slots__ = ()

    def __call__(self, owner: Any, name: Any) -> _Values:
        if owner is not _Format or name not in _FORMATS:
            raise pickle.UnpicklingError(f"it asks for an attribute {name!r}")
        return _Values(name)


class _Tensor:
    """Stands for the function that makes a tensor."""

    __slots__ = ()  # nothing can be set on it either

    def __call__(self, *arguments: Any) -> _Values:
        return _Values(*arguments)


class _Storage:
    """Stands for the function that makes a tensor's values: it opens a file of `torch.save` within the pickle."""

    __slots__ = ()

    def __call__(self, content: bytes) -> _Values:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # torch itself would open it unlimited
        return _Values()


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _VALUES:
            return _Values
        if (module, name) == ("transformer_engine.common.recipe", "Format"):
            return _Format
        if (module, name) == ("builtins", "getattr"):
            return _Member()
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor()
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _Storage()
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _check_plain(value: Any) -> None:
    """Functions may be called while a state is read, and not stay in it: a recipe's attribute is called later."""
    if isinstance(value, Mapping):
        parts: Any = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, _Values):
        parts = value.parts
    elif isinstance(value, _PLAIN):
        parts = ()
    else:
        raise pickle.UnpicklingError(f"it holds {type(value).__name__}")
    for part in parts:
        _check_plain(part)

"""Whose Adam megatron-core uses, and what makes torch's resume right.

megatron-core 0.16.1 decides when it is imported: TransformerEngine's fused Adam if that can be imported, else apex's,
else torch's. What it decided is written down in two of its modules; `use` sets both, so that a choice is a choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from megatron_octo.runtime.patches import Patch, apply
from megatron_octo.runtime.quick_import import import_megatron

Implementation = Literal["transformer_engine", "apex", "torch"]

_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def use(implementation: Implementation) -> None:
    """Make `get_megatron_optimizer` build this AdamW; optimizers built before keep theirs.

    Args:
        implementation: one that is there (`runtime.accelerator.choose_optimizer`).
    """
    import_megatron()
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    own = implementation == "torch"
    optimizer.Adam = torch.optim.AdamW if own else _fused_class(implementation)
    optimizer.USING_PYTORCH_OPTIMIZER = own
    # The distributed optimizer saves and loads step counts by whose optimizer it believes to hold.
    distrib_optimizer.Adam = torch.optim.Adam if own else optimizer.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = not own
    distrib_optimizer.USING_TE_OPTIMIZER = implementation == "transformer_engine"
    distrib_optimizer.USING_APEX_OPTIMIZER = implementation == "apex"
    if own:
        apply(RESUME)


def _fused_class(implementation: Implementation) -> type:
    if implementation == "transformer_engine":
        from transformer_engine.pytorch.optimizers import FusedAdam
    else:
        from apex.optimizers import FusedAdam
    return FusedAdam


def _primed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give AdamW the state of step 0 before a state dictionary is built from it."""

    @functools.wraps(original)
    def sharded_state_dict(self: Any, *arguments: Any, **options: Any) -> Any:
        for group, parameter, state in _adamw_states(self):
            if not state:
                state["step"] = torch.tensor(0.0, device=_step_device(group, parameter))
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
        return original(self, *arguments, **options)

    return sharded_state_dict


def _with_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Fill in the 'step' that the fully reshardable loader leaves out; it is restored separately."""

    @functools.wraps(original)
    def set_states(self: Any, model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> Any:
        if "step" not in tensors and isinstance(self.optimizer, torch.optim.AdamW):
            group, order = self.model_param_group_index_map[model_parameter]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            if "step" in state:
                tensors = {**tensors, "step": state["step"]}
        return original(self, model_parameter, tensors)

    return set_states


def _own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """After loading, give each parameter its own step counter instead of one shared tensor."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> Any:
        answer = original(self, state_dict)
        for group, parameter, state in _adamw_states(self):
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].detach().clone().to(_step_device(group, parameter))
        return answer

    return load_state_dict


def _adamw_states(optimizer: Any) -> list[tuple[dict[str, Any], torch.nn.Parameter, dict[str, Any]]]:
    """List (group, parameter, state) of torch's AdamW inside a distributed optimizer; empty for any other kind."""
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.AdamW):
        return []
    return [(group, one, inner.state[one]) for group in inner.param_groups for one in group["params"]]


def _step_device(group: dict[str, Any], parameter: torch.nn.Parameter) -> torch.device:
    """Where AdamW keeps a step counter: with its fused kernel beside the parameter, otherwise in main memory."""
    return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


RESUME = (
    Patch(
        _DISTRIBUTED_OPTIMIZER,
        "sharded_state_dict",
        _primed,
        "before the first step torch's AdamW has no state: `assert len(steps) == 1` in DistributedOptimizer.state_dict",
    ),
    Patch(
        _DISTRIBUTED_OPTIMIZER,
        "_set_main_param_and_optimizer_states",
        _with_step,
        "KeyError 'step' in the fully_reshardable loader, which hands over the moments only",
    ),
    Patch(
        _DISTRIBUTED_OPTIMIZER,
        "load_state_dict",
        _own_steps,
        "no error but wrong: all parameters share one step tensor, which AdamW then advances once per parameter "
        "(losses after resume were off by 3e-3)",
    ),
)
"""What torch's AdamW needs in the distributed optimizer, on any device; fused ones are left alone."""

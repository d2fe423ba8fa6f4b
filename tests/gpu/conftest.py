"""What needs a GPU: `pytest tests/gpu` on one Hopper GPU runs all of it; elsewhere each test says why it is skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Attention's backward pass adds up in any order otherwise, and bitwise comparisons need one.
os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent


def lacking() -> str | None:
    """Why these tests cannot run on this machine."""
    from megatron_octo.runtime import accelerator

    machine = accelerator.look()
    if not machine.gpus:
        return "needs an NVIDIA GPU, and torch sees none"
    if machine.capability < (9, 0):
        return f"needs Hopper or newer, not compute capability {machine.capability}"
    fault = accelerator.te_problem(machine)
    return fault and f"needs TransformerEngine: {fault[0]}"


def pytest_collection_modifyitems(items):
    own = [item for item in items if item.path.is_relative_to(HERE)]
    reason = lacking() if own else None
    for item in own:
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.timeout(300))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))

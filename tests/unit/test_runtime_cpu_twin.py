"""The CPU twin changes only what fails without it, says why, and nothing where CUDA is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_octo.runtime.cpu_twin import PATCHES, describe

pytestmark = pytest.mark.timeout(120)

INERT = """
import pkgutil, torch
torch.cuda.is_available = lambda: True
from megatron_octo.runtime.cpu_twin import PATCHES, install
held = lambda: [getattr(pkgutil.resolve_name(patch.target), patch.name) for patch in PATCHES]
before = held()
assert install() is False
assert all(one is other for one, other in zip(before, held()))
"""

NEEDED = """
import torch
from megatron_octo.runtime.cpu_twin import install
torch.set_num_threads(1)
state = torch.get_rng_state()
probes = {
    "torch.cuda.current_device": lambda: torch.cuda.current_device(),
    "torch.cuda.synchronize": lambda: torch.cuda.synchronize(),
    "torch.tensor": lambda: torch.tensor([1.0], device="cuda"),
    "torch.tensor pinned": lambda: torch.tensor([1.0], pin_memory=True),
    "torch.zeros": lambda: torch.zeros(2, device="cuda"),
    "torch.ones": lambda: torch.ones(2, device="cuda"),
    "torch.empty": lambda: torch.empty(2, device="cuda"),
    "torch.empty_like": lambda: torch.empty_like(torch.arange(2), device="cuda"),
    "Tensor.cuda": lambda: torch.arange(2).cuda(),
    "get_rng_state": lambda: torch.cuda.get_rng_state(),
    "random.get_rng_state": lambda: torch.cuda.random.get_rng_state(device="cuda"),
}
for name, probe in probes.items():
    try:
        probe()
    except (RuntimeError, AssertionError):
        continue
    raise SystemExit(f"{name} works without its patch")
untouched = torch.Tensor.type(torch.ones(1)), torch.ones(2), torch.tensor([1, 2]).tolist()
assert install() and install()
for name, probe in probes.items():
    probe()
assert torch.ones(1).type() == untouched[0] == "torch.FloatTensor"
assert torch.equal(torch.ones(2), untouched[1])
assert torch.ones(2).type(torch.int64).dtype == torch.int64
with torch.device("meta"):  # transformers builds models so; wrapped factories must not hide from it
    assert torch.empty(2).is_meta and torch.zeros(2).is_meta and torch.tensor([1]).is_meta

from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
tracker = CudaRNGStatesTracker()
tracker.add("one", 1); tracker.add("two", 2)
assert not torch.equal(tracker.states_["one"], tracker.states_["two"])
torch.manual_seed(9); outside = torch.get_rng_state()
with tracker.fork("one"):
    first = torch.rand(2)
assert torch.equal(outside, torch.get_rng_state())
with tracker.fork("one"):
    assert not torch.equal(first, torch.rand(2))
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_patch_has_a_reason_and_is_listed_once():
    assert all(len(patch.reason) > 30 for patch in PATCHES)
    places = [(patch.target, patch.name) for patch in PATCHES]
    assert len(set(places)) == len(places)
    assert len(describe().splitlines()) == len(PATCHES)


def test_nothing_is_patched_where_cuda_is():
    run(INERT)


def test_patched_calls_fail_without_and_work_with_the_twin():
    run(NEEDED)

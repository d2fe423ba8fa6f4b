"""Whose Adam megatron-core builds is what was chosen, and torch's is mended wherever it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(120)

# A process of its own: the choice is written into megatron-core's modules. FusedAdam classes stand in by their names
# and arguments, since the real ones need CUDA to be imported; tested is which class megatron-core is made to build.
CODE = """
import sys, types, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

class Apex(FusedAdam):
    pass

from megatron_octo.runtime import adam, groups
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.run import OptimizerConfig
groups.initialize_single(seed=1)

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
from megatron_octo.model.build import build_chunks
from megatron_octo.model.translate import ddp_config, optimizer_config

parallel = ParallelConfig()
model = ModelConfig(layers=1, hidden=32, heads=4, kv_groups=2, ffn=64, vocabulary=100)
(chunk,) = build_chunks(model, parallel, "fp32")
wrapped = DistributedDataParallel(chunk.config, ddp_config(parallel), chunk)

def package(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
package("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam)
package("transformer_engine.pytorch", optimizers=sys.modules["transformer_engine.pytorch.optimizers"])
package("transformer_engine", pytorch=sys.modules["transformer_engine.pytorch"])
package("apex.optimizers", FusedAdam=Apex)
package("apex", optimizers=sys.modules["apex.optimizers"])

def built():
    config = optimizer_config(OptimizerConfig(), 1e-3, "fp32", parallel)
    return get_megatron_optimizer(config, [wrapped]).chained_optimizers[0].optimizer

for name, kind in (("transformer_engine", FusedAdam), ("apex", Apex), ("torch", torch.optim.AdamW), ("apex", Apex)):
    adam.use(name)
    assert type(built()) is kind, (name, type(built()))
    names = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")
    flags = tuple(getattr(distrib_optimizer, name) for name in names)
    assert flags == (name != "torch", name == "transformer_engine", name == "apex"), flags
"""

# The three patches of resuming reach a machine with CUDA too, where the CPU twin changes nothing.
MENDED = """
import torch
torch.cuda.is_available = lambda: True
from megatron_octo.runtime import cpu_twin
assert cpu_twin.install() is False
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron_octo.runtime import adam
names = [patch.name for patch in adam.RESUME]
before = [getattr(DistributedOptimizer, name) for name in names]
adam.use("torch")
after = [getattr(DistributedOptimizer, name) for name in names]
assert all(one is not other for one, other in zip(before, after))
adam.use("torch")
assert after == [getattr(DistributedOptimizer, name) for name in names]
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_choice_is_what_megatron_core_builds():
    run(CODE)


def test_torchs_resume_is_mended_with_cuda_too_and_once():
    run(MENDED)

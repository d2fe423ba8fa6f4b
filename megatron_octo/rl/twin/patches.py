"""What stands in for CUDA when OpenRLHF runs on a CPU: one table, each row with its reason.

A row is applied when its module has just been imported, before anyone takes a name out of it. OpenRLHF's and
DeepSpeed's files are not touched.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

STAND_INS = Path(__file__).parent / "site"
"""Directory of the packages that stand in for vLLM and flash-attention."""


@dataclass(frozen=True)
class Patch:
    """One row of the table.

    Args:
        module: the module it changes, right after its import.
        apply: the change.
        reason: why it is needed.
    """

    module: str
    apply: Callable[[Any], None]
    reason: str


def install() -> bool:
    """Put the table in force in this process and in everything forked from it.

    Returns:
        False, having done nothing, where torch sees a GPU.
    """
    import torch

    if torch.cuda.is_available():
        return False
    if str(STAND_INS) not in sys.path:
        sys.path.insert(0, str(STAND_INS))
    waiting = {patch.module: patch for patch in TABLE if patch.module not in sys.modules}
    for patch in TABLE:
        if patch.module not in waiting:
            patch.apply(sys.modules[patch.module])
    sys.meta_path.insert(0, _Finder(waiting))
    return True


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find a module, and has its row applied when it has run."""

    def __init__(self, waiting: dict[str, Patch]) -> None:
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self.waiting.pop(name, None)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_apply(module: ModuleType) -> None:
            execute(module)
            patch.apply(module)

        spec.loader.exec_module = execute_and_apply  # type: ignore[method-assign]
        return spec


class _CpuDevice(str):
    """A device name that reads `cpu`, and `0` inside the `f"cuda:{device}"` of the replay buffer."""

    def __format__(self, specification: str) -> str:
        return "0"


def _no_cuda(torch: Any) -> None:
    device = _CpuDevice("cpu")
    torch.cuda.current_device = lambda: device
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(torch.cuda, name, _doing_nothing())
    # On a machine with a GPU the driver hides it; Ray shows "its" GPUs to the workers again.
    torch.cuda.is_available, torch.cuda.device_count = (lambda: False), (lambda: 0)
    real_empty = torch.empty

    def empty(*arguments: Any, **options: Any) -> Any:
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return real_empty(*arguments, **options)

    torch.empty = empty


def _doing_nothing() -> Callable[..., None]:
    """A function of its own each time: torch's compiler refuses one that has two names in torch."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return nothing


def _cpu_mesh(module: Any) -> None:
    real = module.init_device_mesh

    def init_device_mesh(device_type: str, *arguments: Any, **options: Any) -> Any:
        return real("cpu" if device_type == "cuda" else device_type, *arguments, **options)

    module.init_device_mesh = init_device_mesh


def _full_precision(module: Any) -> None:
    import torch

    module.convert_to_torch_dtype = lambda _: torch.float32


def _plain_optimizer(module: Any) -> None:
    real_train, real_eval = module.get_train_ds_config, module.get_eval_ds_config

    def train(*arguments: Any, **options: Any) -> dict[str, Any]:
        config = real_train(*arguments, **options) | {"bf16": {"enabled": False}}
        if config.get("optimizer", {}).get("type") == "AdamW":
            config["optimizer"]["params"]["torch_adam"] = True
        return config

    def evaluate(*arguments: Any, **options: Any) -> dict[str, Any]:
        return real_eval(*arguments, **options) | {"bf16": {"enabled": False}}

    module.get_train_ds_config, module.get_eval_ds_config = train, evaluate


def _no_shared_memory_op(module: Any) -> None:
    module.build_shm_op = _doing_nothing()


def _prompt_flush(module: Any) -> None:
    class PromptWriter(module.SummaryWriter):  # type: ignore[name-defined]
        def add_scalar(self, *arguments: Any, **options: Any) -> None:
            super().add_scalar(*arguments, **options)
            if arguments and arguments[0] == _LAST_SCALAR:
                self.flush()

    module.SummaryWriter = PromptWriter


_LAST_SCALAR = "train/rollout/num_samples"
"""The scalar OpenRLHF writes last in each step."""

TABLE = (
    Patch("torch", _no_cuda, "OpenRLHF asks torch.cuda for its device, its stream and its memory without a test"),
    Patch("torch.distributed.device_mesh", _cpu_mesh, "OpenRLHF builds its device mesh on 'cuda' by name"),
    Patch("openrlhf.utils.utils", _full_precision, "without native bf16 a tiny model is half as fast in it as in fp32"),
    Patch(
        "openrlhf.utils.deepspeed.deepspeed_utils",
        _plain_optimizer,
        "fp32 as above; torch's AdamW, because DeepSpeed would compile its own for minutes",
    ),
    Patch("deepspeed.comm.torch", _no_shared_memory_op, "DeepSpeed would compile a shared-memory collective first"),
    Patch("torch.utils.tensorboard", _prompt_flush, "progress is read from the events; they are flushed every 120 s"),
)
"""Every change, in the order a worker meets the modules."""

"""Importing megatron-core without the compiler it does not use here."""

from __future__ import annotations

import sys


def import_megatron() -> None:
    """Import megatron-core; on a machine without CUDA leave torch's compiler out.

    megatron-core decorates its fused functions with `torch.compile` at import, which loads TorchDynamo and
    Inductor (more than a second of CPU time in every process). Without CUDA the fusions are switched off
    (`model.translate`), so the decorated functions are left as they are written. Call it before anything imports
    megatron-core; afterwards it does nothing.
    """
    import torch

    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else lambda plain: plain
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compiler

"""Conversions that are killed with SIGKILL, each at a named point: `python killed_conversion.py ROOT`.

Every point gets a process of its own, forked from this one so that the imports are paid for once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_octo import publish
from megatron_octo.checkpoint import dist_write
from megatron_octo.convert import api, derive, forward, safetensors_io

CHANGED = "import, of a source that is another one later"
COMPLETE = ("import, after the rename", "export, after the rename")
FILE_BYTES, SHARD_BYTES = 100_000, 100_000
"""Small enough that the tests' models need several files."""


def dying(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Die instead of the `at`-th call."""
    calls = 0

    def maybe(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return maybe


POINTS: dict[str, tuple[str, Any, str, int]] = {
    "import, before any file": ("from_hf", dist_write, "_write_tensors", 1),
    "import, in the first file": ("from_hf", dist_write._Rows, "resolve_data", 2),
    "import, in a later file": ("from_hf", dist_write._Rows, "resolve_data", 20),
    CHANGED: ("from_hf", dist_write._Rows, "resolve_data", 20),
    "import, file written and not noted": ("from_hf", publish.Partial, "finish", 2),
    "import, before the seal": ("from_hf", dist_write, "seal", 1),
    "import, before the rename": ("from_hf", publish, "_appear", 1),
    "import, while it is made durable": ("from_hf", publish, "flush_to_disk", 2),
    COMPLETE[0]: ("from_hf", publish, "_remove", 1),
    "export, in the first shard": ("to_hf", safetensors_io, "raw_bytes", 1),
    "export, in a later shard": ("to_hf", safetensors_io, "raw_bytes", 60),
    "export, before the configuration": ("to_hf", api.hf_io, "write_configuration", 1),
    "export, before the certificate": ("to_hf", api, "write_certificate", 1),
    "export, before the rename": ("to_hf", publish, "_appear", 1),
    COMPLETE[1]: ("to_hf", publish, "_remove", 1),
    "average, in a later file": ("average", dist_write._Rows, "resolve_data", 20),
    "truncation, before the configuration": ("truncate", derive, "write_json", 1),
}
"""What is converted, and which call of which function is its last."""


def convert(kind: str, root: Path, out: Path) -> None:
    """Make `out` from the models in `root`: `hf`, its import `checkpoint`, and `other` of the same sizes."""
    dist_write.FILE_BYTES = FILE_BYTES
    forward._LONGEST = 128
    if kind == "from_hf":
        api.from_hf(root / "hf", out)
    elif kind == "to_hf":
        api.to_hf(root / "checkpoint", out, shard_bytes=SHARD_BYTES)
    elif kind == "average":
        api.average([root / "checkpoint", root / "other"], out)
    else:
        api.truncate(root / "hf", 2, out)


def main(root: Path) -> int:
    """Kill every conversion; 0 if each died by the signal."""
    torch.set_num_threads(1)
    failed = 0
    for number, (kind, owner, name, at) in enumerate(POINTS.values()):
        child = os.fork()
        if not child:
            setattr(owner, name, dying(getattr(owner, name), at))
            convert(kind, root, root / str(number))
            os._exit(3)
        failed += not os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

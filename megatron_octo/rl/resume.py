"""Which checkpoint an interrupted run may go on from.

OpenRLHF saves the policy and the critic side by side, each with its own `latest`. A kill between the two leaves them
at different steps, or one of them half written; going on from there would pair a policy with another step's critic
without a word. So before a start the newest step that is complete in all of them is made the latest in all.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_octo.files import write_text

_TAG = re.compile(r"^global_step(\d+)$")
_WRITTEN_LAST = "metric.json"


def settle(checkpoints: Path, roles: tuple[str, ...]) -> int:
    """Make the checkpoints of a length stage consistent.

    Args:
        checkpoints: OpenRLHF's `ckpt.path` of the stage.
        roles: its sub-directories, e.g. ("_actor", "_critic").

    Returns:
        The step a start will go on from; 0 means from the beginning, with whatever was there removed.
    """
    complete = [_complete_steps(checkpoints / role) for role in roles]
    common = set.intersection(*complete) if complete else set()
    if not common:
        shutil.rmtree(checkpoints, ignore_errors=True)
        return 0
    newest = max(common)
    for role in roles:
        for path in (checkpoints / role).iterdir():
            match = _TAG.match(path.name)
            if match and int(match[1]) not in range(newest + 1):
                shutil.rmtree(path)
        write_text(checkpoints / role / "latest", f"global_step{newest}")
    return newest


def _complete_steps(directory: Path) -> set[int]:
    """Steps whose save came to its end: OpenRLHF writes a small file after DeepSpeed is done."""
    if not directory.is_dir():
        return set()
    matches = [_TAG.match(path.name) for path in directory.iterdir() if (path / _WRITTEN_LAST).is_file()]
    return {int(match[1]) for match in matches if match}

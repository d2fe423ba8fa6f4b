"""What a campaign knows about its stages, on disk: one small JSON file a stage, replaced atomically."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_octo.config.base import Strict
from megatron_octo.config.load import differences
from megatron_octo.errors import ConfigError, EnvironmentProblem


@dataclass
class StageState:
    """Where one stage stands.

    Attributes:
        status: "waiting", "running", "done" or "failed".
        seconds: wall time over all attempts.
        attempts: how often it was started.
        started, ended: Unix times of the last attempt; 0 when it has not happened.
    """

    stage: str
    status: str = "waiting"
    seconds: float = 0.0
    attempts: int = 0
    started: float = 0.0
    ended: float = 0.0


def read_state(out: Path, stage: str) -> StageState:
    """Read a stage's state; a stage never started is 'waiting'."""
    path = out / "state" / f"{stage}.json"
    return StageState(**json.loads(path.read_text())) if path.exists() else StageState(stage)


def write_state(out: Path, state: StageState) -> None:
    """Replace a stage's state file in one step."""
    write_atomically(out / "state" / f"{state.stage}.json", json.dumps(asdict(state)))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold a campaign directory; the kernel lets go when the process dies, however it dies.

    Raises:
        EnvironmentProblem: another process holds it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot be written ({error.strerror})", fix="choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentProblem(
                f"{out}: another process is running this campaign", fix="wait for it, or choose another --out"
            ) from None
        yield


def settle_config(out: Path, config: Strict) -> None:
    """Record the resolved campaign in its directory, or check that it is the one recorded there.

    Raises:
        ConfigError: the directory belongs to a campaign with other settings; the fields are named.
    """
    path, new = out / "campaign.yaml", config.model_dump(mode="json")
    if not path.exists():
        write_atomically(path, yaml.safe_dump(new, sort_keys=False, allow_unicode=True))
        return
    changed = differences(yaml.safe_load(path.read_text(encoding="utf-8")), new)
    if changed:
        raise ConfigError(
            f"{out} holds a campaign with other settings: {'; '.join(changed[:5])}",
            "finished stages would not be what the new settings say",
            "choose another --out, or restore the settings",
        )


def read_progress(out: Path, stage: str) -> dict[str, Any]:
    """The last progress a running stage wrote; empty when it has written none."""
    try:
        return json.loads((out / "progress" / f"{stage}.json").read_text())
    except (OSError, ValueError):
        return {}

"""What a campaign knows about its stages, on disk: one small JSON file a stage, replaced atomically."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megatron_octo.config.base import Strict
from megatron_octo.config.load import differences, dump_config, load_config
from megatron_octo.errors import ConfigError, EnvironmentProblem
from megatron_octo.files import hold, read_json, write_json

_LOCK_PATIENCE = 1.0  # seconds: somebody may just be asking whether the campaign runs


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
    """Read a stage's state; one never started, or whose file is damaged, is 'waiting': it redoes nothing it did."""
    found = read_json(out / "state" / f"{stage}.json")
    try:
        return StageState(**found)
    except TypeError:  # no mapping, or one with other keys
        return StageState(stage)


def write_state(out: Path, state: StageState) -> None:
    """Replace a stage's state file in one step."""
    write_json(out / "state" / f"{state.stage}.json", asdict(state))


def exclusive(out: Path) -> IO[str]:
    """Claim a campaign directory while the returned context is open.

    Raises:
        EnvironmentProblem: another process holds it, or it cannot be written.
    """
    try:
        return hold(out, _LOCK_PATIENCE)
    except BlockingIOError as error:
        raise EnvironmentProblem(
            f"{out}: another process is running this campaign (process {error.strerror})",
            fix="wait for it, or choose another --out",
        ) from None
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot be written ({error.strerror})", fix="choose another --out") from None


def settle_config(out: Path, config: Strict) -> None:
    """Record the resolved campaign in its directory, or check that it is the one recorded there.

    Raises:
        ConfigError: the directory belongs to a campaign with other settings; the fields are named.
    """
    path = out / "campaign.yaml"
    if not path.exists():
        dump_config(config, path)
        return
    before = load_config(type(config), path)  # so that a field which is younger than the file has its default
    changed = differences(before.model_dump(mode="json"), config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"{out} holds a campaign with other settings: {'; '.join(changed[:5])}",
            "finished stages would not be what the new settings say",
            "choose another --out, or restore the settings",
        )


def read_progress(out: Path, stage: str) -> dict[str, Any]:
    """The last progress a running stage wrote; empty when it has written none."""
    return read_json(out / "progress" / f"{stage}.json") or {}

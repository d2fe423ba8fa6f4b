"""What a run did, rollout by rollout: read from the TensorBoard events OpenRLHF writes, kept as metrics.jsonl."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_octo.files import write_text

FIELDS = {
    "train/rollout/reward_mean": "reward",
    "train/rollout/reward_std": "reward_std",
    "train/rollout/response_length_mean": "response_length",
    "train/rollout/truncated_rate": "truncated",
    "train/correct": "correct",
    "train/format": "format",
    "train/stopped": "stopped",
    "train/reward_errors": "reward_errors",
    "train/policy_loss": "policy_loss",
    "train/critic_loss": "critic_loss",
    "train/values": "value",
    "train/entropy_loss": "entropy",
    "train/ppo_kl": "update_kl",
    "train/ppo_clip_ratio": "clipped",
    "train/kl": "reference_kl",
    "train/actor_grad_norm": "grad_norm",
    "train/actor_lr": "learning_rate",
    "train/timing/step_total": "seconds",
    "train/timing/generation": "generation_seconds",
    "train/timing/make_experience": "scoring_seconds",
    "train/timing/ppo_train": "update_seconds",
    "train/timing/broadcast": "sync_seconds",
}
"""OpenRLHF's scalar -> the name in metrics.jsonl. Rollouts in which only the critic learns have no policy fields."""

_COMPLETE = "train/rollout/num_samples"
_HEADER = struct.Struct("<QI")
_Step = dict[str, Any]


class EventReader:
    """Reads the growing event files of one directory, each byte once.

    A run that was killed and resumed has several files; where two tell of one step, the later one counts.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._offsets: dict[Path, int] = {}
        self._steps: dict[int, _Step] = {}

    def read(self) -> dict[int, _Step]:
        """Complete steps so far, by OpenRLHF's step number (from 1)."""
        from tensorboard.compat.proto.event_pb2 import Event

        for path in sorted(self.directory.glob("events.out.tfevents.*"), key=_started):
            for data in self._records(path):
                self._take(Event.FromString(data))
        return {step: values for step, values in sorted(self._steps.items()) if _COMPLETE in values}

    def forget_after(self, step: int) -> None:
        """Drop what is known of later steps: the run goes on from this one and does them again."""
        self.read()
        self._steps = {known: values for known, values in self._steps.items() if known <= step}

    def _take(self, event: Any) -> None:
        for value in event.summary.value:
            if value.tag.startswith("train/") and value.HasField("simple_value"):
                self._steps.setdefault(event.step, {}).update({value.tag: value.simple_value, "time": event.wall_time})

    def _records(self, path: Path) -> Iterator[bytes]:
        """Whole records past the last offset: length, its checksum, data, its checksum."""
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                length, _ = _HEADER.unpack(header)
                data = file.read(length + 4)
                if len(data) < length + 4:
                    break
                self._offsets[path] = file.tell()
                yield data[:length]


def _started(path: Path) -> tuple[str, str]:
    """Event files carry their start time in their name: events.out.tfevents.<seconds>.<host>..."""
    return path.name.split(".")[3], path.name


def metric_lines(stages: list[dict[int, _Step]], rollouts: list[int]) -> list[_Step]:
    """One object a rollout, numbered over all length stages from 1.

    Args:
        stages: complete steps of each stage.
        rollouts: rollouts each stage has.
    """
    lines, before = [], 0
    for number, (steps, count) in enumerate(zip(stages, rollouts, strict=True)):
        for step, values in steps.items():
            named = {name: _finite(values[tag]) for tag, name in FIELDS.items() if tag in values}
            lines.append({"step": before + step, **named, "length_stage": number, "time": values["time"]})
        before += count
    return lines


def write_metrics(path: Path, lines: list[_Step]) -> None:
    """Replace metrics.jsonl."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _finite(value: float) -> float | None:
    """A figure JSON can hold, with the digits single precision has; what is no number is null."""
    return float(f"{value:.7g}") if math.isfinite(value) else None

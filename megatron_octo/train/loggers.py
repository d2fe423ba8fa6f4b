"""Loggers beside the run's own files: TensorBoard, and Weights & Biases where asked.

The run's own files are the record: if they cannot be written, training ends with an error. A logger is a copy of
them: one that fails is named once and switched off, and training goes on.
"""

from __future__ import annotations

import importlib.util
import math
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_octo.config.observe import WandbConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import EnvironmentProblem
from megatron_octo.files import write_text

TENSORBOARD = "tensorboard"
WANDB = "wandb"
_WANDB_ID = "wandb-id.txt"
_WANDB_PATIENCE = 60  # seconds for its service to answer


class _Sink(Protocol):
    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """The loggers of a run in the one process that reports; without `open` it takes everything and writes nothing."""

    def __init__(self) -> None:
        self._sinks: dict[str, _Sink] = {}

    def open(self, run: RunConfig, step: int) -> None:
        """Start what the run asks for.

        Args:
            run: the run.
            step: steps already taken; TensorBoard hides what a killed attempt wrote after them.

        Raises:
            EnvironmentProblem: W&B has no API key.
        """
        if run.logging.tensorboard:
            self._try(TENSORBOARD, lambda: self._sinks.update(tensorboard=_Board(run.out / TENSORBOARD, step)))
        if run.logging.wandb is not None:
            wandb = run.logging.wandb
            self._try(WANDB, lambda: self._sinks.update(wandb=_Wandb(run, wandb)))

    def rewind(self, run: RunConfig, step: int) -> None:
        """Let TensorBoard hide what was written after a step. W&B keeps its points and takes new ones after them."""
        board = self._sinks.pop(TENSORBOARD, None)
        if board is not None:
            self._try(TENSORBOARD, board.close)
            self._try(TENSORBOARD, lambda: self._sinks.update(tensorboard=_Board(run.out / TENSORBOARD, step)))

    def write(self, step: int, scalars: dict[str, float | None]) -> None:
        """Hand points to every logger.

        Args:
            step: optimizer steps taken.
            scalars: "group/name" -> value; what is None or not finite is left out.
        """
        points = {name: value for name, value in scalars.items() if value is not None and math.isfinite(value)}
        for name, sink in list(self._sinks.items()):
            self._try(name, lambda sink=sink: sink.write(step, points))

    def close(self) -> None:
        """Flush and end all of them."""
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)
        self._sinks.clear()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except EnvironmentProblem:
            raise
        except Exception as error:  # whatever a logger's client thinks of
            self._sinks.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(
                f"octo: warning: {name} failed and is switched off until the next start ({reason}); "
                "training goes on, metrics.jsonl holds every step",
                file=sys.stderr,
                flush=True,
            )


def check_loggers(run: RunConfig) -> None:
    """Check, before anything starts, that what a run wants to log to is installed.

    Raises:
        EnvironmentProblem: W&B is asked for and its package is not there.
    """
    if run.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise EnvironmentProblem(
            "logging.wandb is set, and the package wandb is not installed",
            "Weights & Biases is optional and not among this project's own needs",
            "pip install wandb, or remove logging.wandb",
        )


class _Board:
    """TensorBoard events through its own writer: torch's wrapper costs seconds of imports at start."""

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=log))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run for one run directory, over all its restarts; its key is read from the environment by W&B alone.

    Where its service does not answer, points are kept under `wandb/` in the run directory, for `wandb sync`.
    """

    def __init__(self, run: RunConfig, wanted: WandbConfig) -> None:
        import wandb

        try:
            self._run = _start_wandb(wandb, run, wanted, wanted.mode)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise EnvironmentProblem(
                f"logging.wandb: {' '.join(str(error).split())[:200]}",
                "an online run belongs to somebody",
                "set WANDB_API_KEY, call `wandb login`, or set logging.wandb.mode: offline",
            ) from None
        except wandb.errors.CommError as error:
            print(f"octo: warning: W&B does not answer ({error}); logging offline", file=sys.stderr, flush=True)
            wandb.teardown()  # its service still holds the run that did not start
            self._run = _start_wandb(wandb, run, wanted, "offline")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if step >= self._run.step:  # a killed attempt got further: its points, the same ones, are already there
            self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


def _start_wandb(wandb: Any, run: RunConfig, wanted: WandbConfig, mode: str) -> Any:
    # Nothing but the configuration is sent: no console, code, command line or machine description.
    settings = wandb.Settings(
        console="off", save_code=False, disable_git=True, silent=True, init_timeout=_WANDB_PATIENCE, x_disable_meta=True
    )
    return wandb.init(
        project=wanted.project,
        entity=wanted.entity,
        name=run.name,
        id=_wandb_id(run.out),
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(run.out),
        config=run.model_dump(mode="json"),
        settings=settings,
    )


def _wandb_id(out: Path) -> str:
    """The W&B id of a run directory, drawn once."""
    path = out / _WANDB_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()

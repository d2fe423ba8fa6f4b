"""Runs the stages of a campaign: each a process, started when what it needs is done and cores are free."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_octo.campaign.live import Display
from megatron_octo.campaign.stages import Stage
from megatron_octo.campaign.state import StageState, read_state, write_state
from megatron_octo.errors import StageFailed
from megatron_octo.progress import PROGRESS_VARIABLE
from megatron_octo.runtime.launch import ERROR_PREFIX, die_with_parent

OCTO = (sys.executable, "-m", "megatron_octo.cli")
"""The command a stage's arguments are given to."""

_POLL_SECONDS = 0.2
_SIGTERM_GRACE_SECONDS = 30


@dataclass
class Running:
    """A stage's process and the state it is recorded under."""

    stage: Stage
    process: subprocess.Popen[bytes]
    state: StageState
    seconds_before: float
    log_start: int


class Engine:
    """Walks a campaign's stages to the end.

    Args:
        out: campaign directory.
        stages: all stages; every name in a stage's `needs` is among them.
        cores: how many cores stages may use together; a stage that wants more runs alone.
        command: what a stage's arguments are given to.
    """

    def __init__(self, out: Path, stages: list[Stage], cores: int, command: tuple[str, ...] = OCTO) -> None:
        self.out, self.stages, self.cores, self.command = out, stages, cores, command
        self.done = {stage.name for stage in stages if stage.is_there and read_state(out, stage.name).status == "done"}
        self.running: dict[str, Running] = {}
        self.display = Display(out, stages)

    def run(self) -> None:
        """Run every stage that is not done; returns when all are.

        Raises:
            StageFailed: a stage ended with an error; stages already running are ended first.
        """
        with self.display:
            try:
                while len(self.done) < len(self.stages):
                    self._start_ready()
                    time.sleep(_POLL_SECONDS)
                    self._collect()
                    self.display.show(set(self.running), self.done)
            finally:
                self._end_all()

    def _start_ready(self) -> None:
        for stage in self.stages:
            if stage.name in self.done or stage.name in self.running or not self.done.issuperset(stage.needs):
                continue
            busy = sum(min(run.stage.cores, self.cores) for run in self.running.values())
            if busy and busy + stage.cores > self.cores:
                continue
            self._start(stage)

    def _start(self, stage: Stage) -> None:
        state = read_state(self.out, stage.name)
        before = state.seconds
        state.status, state.started, state.attempts = "running", time.time(), state.attempts + 1
        write_state(self.out, state)
        for folder in ("logs", "progress"):
            (self.out / folder).mkdir(exist_ok=True)
        progress = self.out / "progress" / f"{stage.name}.json"
        progress.unlink(missing_ok=True)
        with (self.out / "logs" / f"{stage.name}.log").open("ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                [*self.command, *stage.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, PROGRESS_VARIABLE: str(progress)},
                preexec_fn=die_with_parent(),
                start_new_session=True,
            )
        self.running[stage.name] = Running(stage, process, state, before, log_start)

    def _collect(self) -> None:
        for name, run in list(self.running.items()):
            code = run.process.poll()
            if code is None:
                continue
            del self.running[name]
            self._record(run, "done" if code == 0 else "failed")
            if code != 0:
                raise self._failure(run, code)
            self.done.add(name)

    def _record(self, run: Running, status: str) -> None:
        run.state.ended = time.time()
        run.state.seconds = run.seconds_before + run.state.ended - run.state.started
        run.state.status = status
        write_state(self.out, run.state)

    def _failure(self, run: Running, code: int) -> StageFailed:
        log = self.out / "logs" / f"{run.stage.name}.log"
        with log.open("rb") as file:
            file.seek(run.log_start)  # what earlier attempts said is not the cause of this one's end
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        clear = [line.removeprefix(ERROR_PREFIX).strip() for line in lines if line.startswith(ERROR_PREFIX)]
        ending = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        cause = clear[-1] if clear else f"{ending}: {lines[-1] if lines else 'it wrote nothing'}"
        fix = "" if "fix: " in cause else "mend it and run the same command again"
        failure = StageFailed(f"stage '{run.stage.name}': {cause}", f"log: {log}", fix)
        failure.exit_code = code if clear and code > 0 else failure.exit_code
        return failure

    def _end_all(self) -> None:
        """End what still runs: politely first, so that trainers save, then by force."""
        for run in self.running.values():
            _signal_group(run.process, signal.SIGTERM)
        deadline = time.time() + _SIGTERM_GRACE_SECONDS
        for run in self.running.values():
            try:
                run.process.wait(max(0.1, deadline - time.time()))
            except subprocess.TimeoutExpired:
                _signal_group(run.process, signal.SIGKILL)
                run.process.wait()
            self._record(run, "done" if run.process.returncode == 0 else "waiting")
        self.running.clear()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)

"""Starting the driver, watching it, and leaving nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_octo.errors import EnvironmentProblem, StageFailed

_TOKEN = "OCTO_TWIN_TOKEN"
_PREFIX = "octo-ray-"
_LONGEST_DIRECTORY = 40
"""Ray's sockets add 66 characters; the system's limit for a socket's path is 107."""

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_LEAVE = 3.0

_SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",  # the twin is the CPU's, also on a machine with a GPU
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",  # the cores are filled with processes
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # OpenRLHF compiles its entropy; on a CPU that takes longer than the run
    "HF_HUB_OFFLINE": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own pool starts a thread, and the nursery forks
    "RAY_worker_niceness": "0",  # 15 by default: on a busy machine the workers starve
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",  # those would not come from the nursery
}
"""Environment of the driver and all its processes, over the caller's."""

_REMOVED = (
    "RAY_ADDRESS",
    "RAY_TMPDIR",
    "RAY_JOB_ID",
    "OCTO_PROGRESS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
)
"""What must not leak in: another Ray of the user, the caller's progress file, an enclosing distributed job."""


@contextlib.contextmanager
def ray_directory() -> Iterator[Path]:
    """A short temporary directory for one Ray; removed at the end, like those that killed stages left."""
    for root in dict.fromkeys(("/tmp", tempfile.gettempdir())):
        if len(root) <= _LONGEST_DIRECTORY - len(_PREFIX) and os.access(root, os.W_OK):
            break
    else:
        raise EnvironmentProblem("no writable directory with a short path", "Ray's sockets need one", "set TMPDIR=/tmp")
    for left in Path(root).glob(f"{_PREFIX}*"):
        owner = left.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run_driver(job: Path, log: Path, timeout_seconds: float, look: Callable[[], None]) -> None:
    """Run the driver on a job file and wait for it.

    Every process of the job carries a token in its environment; whatever happens, none is alive on return. If the
    caller itself is killed, the kernel ends the driver, its nursery and Ray's servers, and workers leave their Ray.

    Args:
        job: see `driver`.
        log: file for the driver's output.
        timeout_seconds: the hang guard.
        look: called about twice a second.

    Raises:
        StageFailed: the time is over, or the driver ended with an error; with the log's last lines.
    """
    token = uuid.uuid4().hex
    kept = {name: value for name, value in os.environ.items() if name not in _REMOVED}
    command = [sys.executable, "-m", "megatron_octo.rl.twin.driver", str(job)]
    deadline = time.monotonic() + timeout_seconds
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=kept | _SETTINGS | {_TOKEN: token}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise StageFailed(
                        f"reinforcement did not end within {timeout_seconds / 60:g} minutes; log: {log}",
                        fix="raise timeout_minutes, or shorten the runs; started again, they go on",
                    )
                look()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            _end(process, token)
    if process.returncode:
        raise StageFailed(
            f"the driver of OpenRLHF ended with code {process.returncode}: {last_lines(log)}", fix=f"see {log}"
        )


def last_lines(log: Path, count: int = 3) -> str:
    """The last lines of a log that say something, in one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-count:])


def _end(process: subprocess.Popen, token: str) -> None:
    """End the driver and everything that carries its token."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    while left := _carriers(token):
        for number in left if time.monotonic() > deadline else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.05)


def _carriers(token: str) -> list[int]:
    """Processes started with the token in their environment."""
    mark, found = f"{_TOKEN}={token}".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found

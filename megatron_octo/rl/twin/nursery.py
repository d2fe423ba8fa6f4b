"""Ray workers by fork: one process imports everything once, each worker is a copy of it.

A worker of OpenRLHF spends 8 to 11 CPU seconds on imports, and three PPO runs have twelve of them. The nursery is
forked from the driver right after its imports and before Ray starts. Ray is told (runtime environment
`py_executable`) to start workers with `client.py`, which hands its command line, environment and standard streams
over a Unix socket; the nursery forks and the child runs Ray's worker script as a fresh process would.

A fork copies only the calling thread, so the nursery refuses to open where another one runs.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import json
import os
import random
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

from megatron_octo.errors import EnvironmentProblem

_HARMLESS = {"jemalloc_bg_thd"}
"""Threads of libraries that tend to themselves across a fork."""

_PR_SET_PDEATHSIG = 1


def open_nursery(address: Path, seed: int) -> int:
    """Fork the process that will make workers.

    Args:
        address: where its Unix socket is to be; at most 107 characters.
        seed: every worker's Python, NumPy and torch generators start from it, and so the prompt order does.

    Returns:
        The process id. It dies with the caller.

    Raises:
        EnvironmentProblem: threads run, which a fork would lose.
    """
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    if len([name for name in threads if name not in _HARMLESS]) > 1:
        raise EnvironmentProblem(f"threads run before the workers are made: {', '.join(threads)}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(address))
    listener.listen(64)
    gc.collect()
    gc.freeze()  # the copies share these pages as long as no collection touches them
    parent = os.getpid()
    child = os.fork()
    if child:
        listener.close()
        return child
    with contextlib.suppress(BaseException):
        die_with(parent)
        _serve(listener, seed)
    os._exit(1)


def die_with(parent: int) -> None:
    """Have the kernel end this process when `parent`, which must be its parent, ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(listener: socket.socket, seed: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no one waits for workers: Ray watches them by their sockets
    while True:
        connection, _ = listener.accept()
        with connection:
            request, streams = _receive(connection)
            if os.fork() == 0:
                listener.close()
                connection.close()
                _become_worker(request, streams, seed)
            for stream in streams:
                os.close(stream)
            connection.sendall(b"1")


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """Read one request: JSON up to the end of the stream, and the three standard streams beside its first bytes."""
    size = array.array("i").itemsize * 3
    data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(size))
    streams = array.array("i")
    for _, _, payload in ancillary:
        streams.frombytes(payload[:size])
    while chunk := connection.recv(65536):
        data += chunk
    return json.loads(data), list(streams)


def _become_worker(request: dict, streams: list[int], seed: int) -> None:
    """Turn this copy into what the command line asks for; never returns."""
    code = 1
    try:
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["directory"])
        sys.argv = request["arguments"]
        _seed(seed)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _seed(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)

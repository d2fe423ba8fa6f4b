"""Workers and signals: Ctrl-C goes to every process of a terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path

from megatron_octo.data.engine.executors import Workers
from megatron_octo.data.engine.stage import Stage, calls_of

def interrupt():
    while not over:
        os.killpg(0, signal.SIGINT)
        time.sleep(0.003)

over, heard = [], []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))  # so that only workers could die of it
threading.Thread(target=interrupt, daemon=True).start()
stage = Stage("lengths", ["a", "bcd"], len, None)
with Workers(2) as team:
    print(*sorted(facts for _, facts in team.run(calls_of(stage, Path(sys.argv[1])), print)))
over.append(1)
assert heard
"""


@pytest.mark.timeout(60)
def test_a_worker_that_is_starting_hears_nothing_of_ctrl_c(tmp_path) -> None:
    """It would end with a traceback, and the build with a complaint about a worker instead of one line."""
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, start_new_session=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1 3\n", "")

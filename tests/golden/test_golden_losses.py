"""Losses of fixed tiny runs are what they were; `python tests/golden/golden_runs.py` writes them anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from golden_runs import RUNS, STEPS, TOLERANCE, dtype_of, read  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "losses.json"
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "golden_runs.py"), str(path)]
    subprocess.run(command, env=environment, check=True, timeout=180, stderr=subprocess.DEVNULL)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(losses, name):
    golden = read(name)
    assert len(losses[name]) == len(golden) == STEPS
    away = {step: abs(a - b) for step, (a, b) in enumerate(zip(losses[name], golden, strict=True), start=1)}
    worst = max(away, key=away.__getitem__)
    assert away[worst] <= TOLERANCE[dtype_of(name)], f"step {worst}: {losses[name][worst - 1]!r}, {golden[worst - 1]!r}"


def test_golden_runs_differ_from_each_other_by_more_than_the_tolerance():
    """A tolerance that could not tell one model from another would prove nothing."""
    curves = {name: read(name) for name in RUNS}
    for name, curve in curves.items():
        for other, theirs in curves.items():
            if name < other and {dtype_of(name), dtype_of(other)} == {"fp32"}:
                assert max(abs(a - b) for a, b in zip(curve, theirs, strict=True)) > 10 * TOLERANCE["fp32"], other


def test_golden_runs_learn():
    for name in RUNS:
        assert read(name)[-1] < read(name)[0] - 0.5

"""How `octo train` ends: one line says where the run stands, what is saved and what goes on, and none is a lie."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import STEP_TOKENS, values, write_run

from megatron_octo.checkpoint.store import latest_checkpoint
from megatron_octo.runtime.stop import name_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STEPS, HALF = 6, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    run = write_run(folder)
    plain = values(folder)
    plain["schedule"]["tokens"] = STEPS * STEP_TOKENS
    plain["checkpoint"] = {"every": HALF * STEP_TOKENS, "keep": 9}
    run.write_text(yaml.safe_dump({**plain, "threads": 1}))
    return run


def command(run: Path, name: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "megatron_octo.cli", "train", str(run), f"out={run.parent / name}", *more]


def octo(run: Path, name: str, *more: str) -> tuple[int, str]:
    """Exit code and last line of one command."""
    done = subprocess.run(command(run, name, *more), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def finished(run):
    """A run trained in two legs, and the last line of each."""
    legs = [octo(run, "run", "--until", str(HALF * STEP_TOKENS)), octo(run, "run")]
    return run.parent / "run", legs


def test_a_leg_and_a_run_say_what_is_saved_and_what_goes_on(finished):
    out, (leg, end) = finished
    half, whole = out / "checkpoints" / "step_00000003", out / "checkpoints" / "step_00000006"
    assert half.is_dir() and whole.is_dir()
    says = "stopped as --until says: step 3 of 6, 384 tokens"
    assert leg == (0, f"octo: tiny: {says}, saved as {half}; the same command without --until goes on")
    assert end == (0, f"octo: tiny: finished: step 6 of 6, 768 tokens, saved as {whole}")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "; a larger schedule.tokens goes on"),
        (["--until", "300"], "; a larger schedule.tokens goes on"),
        (["--until", "9M"], "; a larger schedule.tokens goes on (--until 9000000 lies beyond the end)"),
    ],
)
def test_a_finished_run_says_that_there_is_nothing_to_do(run, finished, more, says):
    out, _ = finished
    saved = out / "checkpoints" / "step_00000006"
    expected = f"octo: tiny: nothing to do: step 6 of 6, 768 tokens, saved as {saved}{says}"
    assert octo(run, "run", *more) == (0, expected)


def test_a_position_at_the_start_leaves_nothing_to_do_and_nothing_saved(run):
    code, line = octo(run, "none", "--until", "0")
    assert (code, line) == (0, "octo: tiny: nothing to do: step 0 of 6, 0 tokens; --until 0 is already reached")
    assert not (run.parent / "none").exists()


def test_a_damaged_checkpoint_names_the_older_ones_and_the_way_back_works(run, finished):
    out, _ = finished
    shutil.copytree(out, run.parent / "damaged")
    weights = next((run.parent / "damaged" / "checkpoints" / "step_00000006").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    more = f"schedule.tokens={(STEPS + 1) * STEP_TOKENS}"
    code, line = octo(run, "damaged", more)
    latest = run.parent / "damaged" / "latest"
    assert code == 4
    assert f"go back to step_00000003 (sealed before it: step_00000003): echo step_00000003 > {latest}" in line
    latest.write_text("step_00000003\n")
    code, line = octo(run, "damaged", more)
    assert (code, latest_checkpoint(run.parent / "damaged").name) == (0, "step_00000007"), line


def test_a_pointer_without_checkpoints_is_not_told_to_name_one(run, finished):
    out, _ = finished
    shutil.copytree(out, run.parent / "emptied")
    shutil.rmtree(run.parent / "emptied" / "checkpoints")
    code, line = octo(run, "emptied")
    place = run.parent / "emptied" / "checkpoints"
    assert code == 4
    assert line.endswith(f"sealed checkpoints: none; fix: restore {place}, or remove latest to begin anew")


def test_a_place_where_no_directory_can_be(run):
    code, line = octo(run, "x", "out=/proc/x")
    assert code == 6 and line.startswith("octo: error: /proc/x: cannot be made ("), line


def test_a_loss_that_climbed_is_told_and_a_healthy_run_is_not_accused(run, finished):
    more = ["schedule.learning_rate=3", f"schedule.tokens={20 * STEP_TOKENS}"]
    done = subprocess.run(command(run, "climbed", *more), capture_output=True, text=True, timeout=120)
    warning, end = done.stderr.splitlines()[-2:]
    assert done.returncode == 0 and "finished" in end
    assert re.match(r"octo: warning: the loss climbed from 4\.\d+ to \d\d\.?\d* .* since step 8; if it", warning), (
        warning
    )
    assert "octo: warning: step 8: the loss climbed" in (run.parent / "climbed" / "log-rank0.txt").read_text()
    assert "climbed" not in (finished[0] / "log-rank0.txt").read_text()


def test_a_run_file_in_the_place_of_its_record_keeps_its_comments(run):
    own = run.parent / "own" / "config.yaml"
    own.parent.mkdir()
    text = f"# mine\n{run.read_text()}".replace(str(run.parent / "reference"), str(own.parent))
    own.write_text(text)
    done = subprocess.run([*command(own, ".", "--until", "128")[:5], "--until", "128"], capture_output=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert own.read_text() == text


def test_lines_that_are_gone_are_told(run, finished):
    shutil.copytree(finished[0], run.parent / "lineless")
    (run.parent / "lineless" / "metrics.jsonl").unlink()
    more = f"schedule.tokens={(STEPS + 1) * STEP_TOKENS}"
    done = subprocess.run(command(run, "lineless", more), capture_output=True, text=True, timeout=90)
    assert f"octo: {run.parent / 'lineless' / 'metrics.jsonl'} is missing; its lines to step 6 are gone" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_names_step_and_checkpoint(run, number):
    name = f"stopped-by-{number.name}"
    long = command(run, name, "schedule.tokens=1M")
    process = subprocess.Popen(long, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = run.parent / name / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (lines.is_file() and lines.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].splitlines()[-1]
    saved = latest_checkpoint(run.parent / name)
    step = int(saved.name.removeprefix("step_"))
    assert process.returncode == 75
    assert said.startswith(f"octo: error: tiny: stopped by {name_of(number)}, ")
    assert f"after step {step} ({step * STEP_TOKENS} tokens), saved as {saved}; " in said
    assert said.endswith("fix: start the same command again to go on")

"""The engine on small real processes: order, cores, failure, kill and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.campaign.engine import Engine
from megatron_octo.campaign.stages import Stage
from megatron_octo.campaign.state import exclusive, read_state, settle_config
from megatron_octo.config.run import BatchConfig
from megatron_octo.errors import ConfigError, EnvironmentProblem, StageFailed

STAGE = textwrap.dedent("""
    import json, os, sys, time
    journal, name, seconds, code = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    def write(event):
        with open(journal, "a") as file:
            file.write(json.dumps({"stage": name, "event": event, "time": time.time(), "pid": os.getpid()}) + "\\n")
    write("start")
    time.sleep(seconds)
    if code:
        print("octo: error: the file is missing; fix: make it", file=sys.stderr)
    else:
        write("end")
    sys.exit(code)
""")


def command(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "stage.py"
    script.write_text(STAGE)
    return (sys.executable, str(script), str(tmp_path / "journal"))


def stage(name: str, *needs: str, seconds: float = 0.1, code: int = 0, cores: int = 1) -> Stage:
    return Stage(name, name, needs, (name, str(seconds), str(code)), cores)


def journal(tmp_path: Path) -> list[dict]:
    path = tmp_path / "journal"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def order(tmp_path: Path, event: str) -> list[str]:
    return [entry["stage"] for entry in journal(tmp_path) if entry["event"] == event]


TREE = [
    stage("data"),
    stage("stable", "data"),
    stage("long", "stable"),
    stage("short", "stable"),
    stage("end", "long", "short"),
]


@pytest.mark.timeout(30)
def test_order_and_state(tmp_path: Path) -> None:
    Engine(tmp_path / "out", TREE, 2, command(tmp_path)).run()
    ended = order(tmp_path, "end")
    assert ended[:2] == ["data", "stable"] and ended[-1] == "end" and len(ended) == 5
    states = [read_state(tmp_path / "out", each.name) for each in TREE]
    assert all(state.status == "done" and state.attempts == 1 and state.seconds >= 0.1 for state in states)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("cores", "overlap"), [(2, True), (1, False)])
def test_branches_run_side_by_side_when_cores_allow(tmp_path: Path, cores: int, overlap: bool) -> None:
    Engine(tmp_path / "out", [stage("long", seconds=0.8), stage("short", seconds=0.8)], cores, command(tmp_path)).run()
    first_two = [entry["event"] for entry in journal(tmp_path)[:2]]
    assert (first_two == ["start", "start"]) == overlap


@pytest.mark.timeout(30)
def test_a_stage_that_wants_more_cores_than_there_are_runs_alone(tmp_path: Path) -> None:
    Engine(
        tmp_path / "out", [stage("wide", cores=4, seconds=0.5), stage("thin", seconds=0.5)], 2, command(tmp_path)
    ).run()
    assert [entry["event"] for entry in journal(tmp_path)] == ["start", "end", "start", "end"]


@pytest.mark.timeout(30)
def test_failure_is_one_clear_line_and_others_are_ended(tmp_path: Path) -> None:
    stages = [stage("slow", seconds=60), stage("broken", code=3), stage("after", "broken")]
    with pytest.raises(StageFailed, match="'broken': the file is missing; fix: make it") as caught:
        Engine(tmp_path / "out", stages, 2, command(tmp_path)).run()
    assert caught.value.exit_code == 3
    assert read_state(tmp_path / "out", "broken").status == "failed"
    assert read_state(tmp_path / "out", "slow").status == "waiting"
    assert order(tmp_path, "start").count("after") == 0
    slow = next(entry["pid"] for entry in journal(tmp_path) if entry["stage"] == "slow")
    assert not Path(f"/proc/{slow}").exists()


@pytest.mark.timeout(30)
def test_an_old_error_is_not_the_cause_of_a_new_end(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="the file is missing"):
        Engine(tmp_path / "out", [stage("one", code=3)], 2, command(tmp_path)).run()
    killed = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(StageFailed, match="ended by signal 9: it wrote nothing") as caught:
        Engine(tmp_path / "out", [stage("one")], 2, killed).run()
    assert caught.value.exit_code == StageFailed.exit_code


@pytest.mark.timeout(30)
def test_a_done_stage_whose_results_are_gone_runs_again(tmp_path: Path) -> None:
    result = tmp_path / "result"
    stages = [replace(stage("one"), results=(result,)), stage("two", "one")]
    result.touch()
    Engine(tmp_path / "out", stages, 2, command(tmp_path)).run()
    Engine(tmp_path / "out", stages, 2, command(tmp_path)).run()
    assert order(tmp_path, "end") == ["one", "two"]
    result.unlink()
    Engine(tmp_path / "out", stages, 2, command(tmp_path)).run()
    assert order(tmp_path, "end") == ["one", "two", "one"]


@pytest.mark.timeout(60)
def test_killed_engine_takes_its_stages_along_and_the_next_goes_on(tmp_path: Path) -> None:
    prefix = command(tmp_path)
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        from megatron_octo.campaign.engine import Engine
        from megatron_octo.campaign.stages import Stage
        stages = [Stage("first", "", (), ("first", "0.1", "0")), Stage("second", "", ("first",), ("second", "30", "0"))]
        Engine(Path({str(tmp_path / "out")!r}), stages, 2, {prefix!r}).run()
        """)
    )
    engine = subprocess.Popen([sys.executable, str(driver)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 20
    while "second" not in order(tmp_path, "start"):
        assert time.time() < deadline
        time.sleep(0.05)
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait()
    orphan = next(entry["pid"] for entry in journal(tmp_path) if entry["stage"] == "second")
    while Path(f"/proc/{orphan}").exists() and "Z" not in Path(f"/proc/{orphan}/stat").read_text().split(")")[1][:3]:
        assert time.time() < deadline, "the stage outlived its engine"
        time.sleep(0.05)
    stages = [stage("first"), stage("second", "first")]
    Engine(tmp_path / "out", stages, 2, prefix).run()
    assert order(tmp_path, "start") == ["first", "second", "second"]
    assert read_state(tmp_path / "out", "second").attempts == 2


def test_a_directory_belongs_to_one_campaign(tmp_path: Path) -> None:
    settle_config(tmp_path, BatchConfig(global_batch=8, micro_batch=2))
    settle_config(tmp_path, BatchConfig(global_batch=8, micro_batch=2))
    with pytest.raises(ConfigError, match="micro_batch: 2 -> 4"):
        settle_config(tmp_path, BatchConfig(global_batch=8, micro_batch=4))


def test_one_campaign_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(EnvironmentProblem, match="another process"), exclusive(tmp_path):
        pass

"""The stage before any process starts: the gate, the files, the refusals; and the guard around the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_octo.config.load import parse_config
from megatron_octo.config.rl import RLStageConfig
from megatron_octo.errors import CertificateError, ConfigError, DataError, EnvironmentProblem, StageFailed
from megatron_octo.files import hold
from megatron_octo.rl import run as rl_run
from megatron_octo.rl.directory import RunDirectory, complete_mark
from megatron_octo.rl.run import train_rl
from megatron_octo.rl.tokens import read_tokenizer
from megatron_octo.rl.twin import launch

SMALL = {
    "prompts": 4, "samples": 4, "mini_batch_prompts": 2, "micro_batch": 8, "rollout_micro_batch": 16,
    "rollouts": 3, "max_response": 20, "template": "world",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The files of a model directory that are read before the weights are."""
    from tokenizers import Tokenizer, models

    path = tmp_path / "model"
    path.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["<|pad|>", "<|end_of_text|>", "<|eot|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end_of_text|>"}, "pad_token": "<|pad|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def stage(tmp_path: Path, labels=("long",), **values) -> RLStageConfig:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"id": "a", "question": "1+1?", "answer": "2"}\n')
    runs = {
        label: {"model": str(tmp_path / "model"), "out": str(tmp_path / label), "problems": str(problems)}
        for label in labels
    }
    return parse_config(RLStageConfig, {"rl": SMALL | values, "runs": runs}, "rl.yaml")


def certified(model: Path) -> dict:
    return {"self_sha256": "0" * 64}


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> list:
    """The driver replaced by a note that it was called."""
    calls: list = []
    monkeypatch.setattr(rl_run, "run_driver", lambda *arguments: calls.append(arguments))
    return calls


def test_an_unproven_model_is_refused_before_anything_starts(tmp_path: Path, model: Path, no_driver: list) -> None:
    with pytest.raises(CertificateError, match="certificate"):
        train_rl(stage(tmp_path))
    assert not no_driver and not (tmp_path / "long").exists()


def test_one_unproven_model_stops_all(tmp_path: Path, model: Path, no_driver: list) -> None:
    def gate(path: Path) -> dict:
        if gate.calls:
            raise CertificateError("short: altered")
        gate.calls += 1
        return certified(path)

    gate.calls = 0
    with pytest.raises(CertificateError, match="altered"):
        train_rl(stage(tmp_path, ("long", "short")), certify=gate)
    assert not no_driver and not (tmp_path / "long").exists()


def test_the_files_openrlhf_reads(tmp_path: Path, model: Path, no_driver: list) -> None:
    with pytest.raises(StageFailed, match="long: ended without an outcome"):
        train_rl(stage(tmp_path), certify=certified)
    out = tmp_path / "long"
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "Question: 1+1?\nAnswer:", "label": "2", "datasource": "problems"}] * 3 * 4
    argv = json.loads((out / "argv.json").read_text())
    assert argv["module"] == "openrlhf.cli.train_ppo_ray" and len(argv["stages"]) == 1
    assert "'<|end_of_text|>'" in (out / "reward.py").read_text()
    assert json.loads((out / "settings.json").read_text())["config"]["prompts"] == 4
    assert no_driver and not (out / "done.json").exists()


def test_bos_is_asked_for(tmp_path: Path, model: Path, no_driver: list) -> None:
    with pytest.raises(StageFailed):
        train_rl(stage(tmp_path, bos=True), certify=certified)
    assert '"prompt": "<|bos|>Question: 1+1?' in (tmp_path / "long" / "prompts.jsonl").read_text()


def test_a_directory_keeps_its_settings(tmp_path: Path, model: Path, no_driver: list) -> None:
    with pytest.raises(StageFailed):
        train_rl(stage(tmp_path), certify=certified)
    with pytest.raises(ConfigError, match=r"other settings \(config.samples: 4 -> 8\)"):
        train_rl(stage(tmp_path, samples=8), certify=certified)
    with pytest.raises(ConfigError, match="certificate"):
        train_rl(stage(tmp_path), certify=lambda _: {"self_sha256": "1" * 64})
    with pytest.raises(StageFailed):
        train_rl(stage(tmp_path), certify=certified)
    assert len(no_driver) == 2


def test_a_run_that_is_not_whole_is_not_finished(tmp_path: Path, model: Path) -> None:
    config = stage(tmp_path)
    run = RunDirectory.of(config, "long", certified(model))
    run.prepare()
    trained = run.files[0].model
    trained.mkdir(parents=True)
    (trained / "config.json").write_text("{}")
    complete_mark(run.files[0]).touch()
    assert "0 of 3 rollouts" in run.finish()
    assert not run.done_file.exists() and not complete_mark(run.files[0]).exists()


def test_a_finished_run_is_not_done_again(tmp_path: Path, model: Path, no_driver: list) -> None:
    with pytest.raises(StageFailed):
        train_rl(stage(tmp_path), certify=certified)
    (tmp_path / "long" / "done.json").write_text('{"rollouts": 3}')
    assert train_rl(stage(tmp_path), certify=certified) == {"long": {"rollouts": 3}}
    assert len(no_driver) == 1


def test_a_wrong_run_writes_nothing(tmp_path: Path, model: Path, no_driver: list) -> None:
    with pytest.raises(ConfigError, match="template"):
        train_rl(stage(tmp_path, template="worlds"), certify=certified)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer cannot be read"):
        train_rl(stage(tmp_path), certify=certified)
    assert not no_driver and not (tmp_path / "long" / "prompts.jsonl").exists()


def test_end_tokens_are_generations_own(model: Path) -> None:
    special = read_tokenizer(model)
    assert (special.bos, special.ends, special.pad) == ("<|bos|>", ("<|end_of_text|>",), "<|pad|>")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read_tokenizer(model).ends == ("<|end_of_text|>", "<|eot|>")


def run_instead(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the guard start a small program instead of the driver."""
    real = launch.subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", popen)


_LEAVES_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
{then}
"""


def alive(number: int) -> bool:
    try:
        return (Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]) != "Z"
    except OSError:
        return False


def test_a_hang_is_ended_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, _LEAVES_A_CHILD.format(then="time.sleep(60)"))
    monkeypatch.setattr(launch, "_SECONDS_TO_LEAVE", 0.2)
    log, started = tmp_path / "log", time.monotonic()
    with pytest.raises(StageFailed, match="did not end within"):
        launch.run_driver(tmp_path / "job.json", log, 2.0, lambda: None)
    assert time.monotonic() - started < 20
    assert not alive(int(log.read_text().split()[0]))


def test_a_crash_shows_the_logs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, _LEAVES_A_CHILD.format(then="raise ValueError('no more memory')"))
    monkeypatch.setattr(launch, "_SECONDS_TO_LEAVE", 0.2)
    log = tmp_path / "log"
    with pytest.raises(StageFailed, match=r"code 1: .*ValueError: no more memory"):
        launch.run_driver(tmp_path / "job.json", log, 60, lambda: None)
    assert not alive(int(log.read_text().split()[0]))


def a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> str:
    """A module that stands for OpenRLHF's, on the path of this process and its children."""
    (tmp_path / "openrlhf_stub.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rl_run, "_SECONDS_BETWEEN_LOOKS", 0.05)
    return "openrlhf_stub"


def test_a_cluster_job_gets_its_arguments_and_gives_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = a_job(monkeypatch, tmp_path, "import sys; print(sys.argv[1:], __name__); sys.exit(3)")
    log = tmp_path / "log"
    assert rl_run._one_job(module, ["--a", "1"], log, time.monotonic() + 60, lambda: None) == 3
    assert log.read_text().split("\n")[0] == "['--a', '1'] __main__"


def test_a_cluster_jobs_time_is_told_and_no_other_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True)"
    module = a_job(monkeypatch, tmp_path, f"{deaf}; time.sleep(60)")
    monkeypatch.setattr(rl_run, "_SECONDS_TO_LEAVE", 0.2)
    monkeypatch.setattr(rl_run, "MODULE", module)

    class Run:
        def __init__(self, name: str) -> None:
            self.label, self.out = name, tmp_path / name
            self.out.mkdir()

        def job(self) -> dict:
            return {"stages": [{"arguments": [], "complete": str(self.out / "complete")}]}

    runs = [Run("long"), Run("short")]
    config = stage(tmp_path).model_copy(update={"timeout_minutes": 3 / 60})
    with pytest.raises(StageFailed, match="did not end within 0.05 minutes"):
        rl_run._on_cluster(config, runs, lambda: None)
    assert not alive(int((tmp_path / "long" / "openrlhf.log").read_text()))
    assert not (tmp_path / "short" / "openrlhf.log").exists()


def test_a_cluster_job_ends_with_a_killed_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = a_job(monkeypatch, tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    log = tmp_path / "log"
    code = (
        "import sys, time; from pathlib import Path; from megatron_octo.rl.run import _one_job; "
        f"_one_job({module!r}, [], Path({str(log)!r}), time.monotonic() + 60, lambda: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    while alive(int(log.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_directory_has_one_writer(tmp_path: Path, model: Path, no_driver: list) -> None:
    with hold(tmp_path / "long"), pytest.raises(EnvironmentProblem, match=f"process {os.getpid()}"):
        train_rl(stage(tmp_path), certify=certified)
    assert not no_driver and not (tmp_path / "long" / "prompts.jsonl").exists()


def test_left_directories_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = 2**22 + 1  # above the largest process id of Linux
    left, own = Path(f"/tmp/octo-ray-{gone}-x"), Path(f"/tmp/octo-ray-{os.getpid()}-x")
    for path in (left, own):
        path.mkdir(exist_ok=True)
    with launch.ray_directory() as directory:
        assert not left.exists() and own.exists() and directory.exists() and len(str(directory)) <= 40
    assert not directory.exists()
    own.rmdir()

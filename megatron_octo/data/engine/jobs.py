"""A build on Slurm: its jobs are rendered here, and do their shares of its stages here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import dump_config
from megatron_octo.data.corpora.files import unread_files
from megatron_octo.data.corpora.problems import build_world
from megatron_octo.data.engine.build import being_written, claim, is_whole, only_writer, published, refuse_other
from megatron_octo.data.engine.executors import InProcess, use_one_thread
from megatron_octo.data.engine.on_slurm import SUBMITTED, render
from megatron_octo.data.engine.plan import Plan
from megatron_octo.data.engine.publish import WORK, finish_publishing, keep_revisions
from megatron_octo.data.engine.stage import Stage, calls_of, run_calls
from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem
from megatron_octo.files import hold, read_json

_PATIENCE = 10.0  # seconds that whoever submits may look at the directory
_PLAN, _SETTINGS = "plan.json", "build.yaml"
_OCTO = [sys.executable, "-m", "megatron_octo.cli", "data"]


def render_build(config: DataBuildConfig, out: Path, workers: int | None) -> tuple[Path | None, str | None]:
    """Write the jobs of what is left of a build, and submit them where this machine has `sbatch`.

    The jobs build what is told here, whatever becomes of the file it is from while they wait: settings and the list of
    input files are written down beside the jobs. They do not look at all inputs again either, but each at its own.

    Args:
        config: what to build.
        out: data directory, on a file system that all nodes share.
        workers: how many jobs may run at the same time; None for no limit.

    Returns:
        The script that submits the jobs, and what it said if it was run; no script where the directory holds this
        build, finished and whole: nothing is left to do.

    Raises:
        ConfigError, DataError: as `build_data`.
        EnvironmentProblem: `sbatch` refuses a job.
    """
    out = out.absolute()
    build_world(config)
    plan = Plan(config, out)
    unread_files(config, plan.revisions)
    plan.tell_inputs()
    with only_writer(out, published(config)):
        _refuse_queued(out)
        finish_publishing(out)
        finished = claim(out, config)
        if finished is not None:
            refuse_other(out, "inputs", _sizes(finished["inputs"]), plan.sizes_by_field())
            if is_whole(out):
                shutil.rmtree(out / WORK, ignore_errors=True)
                return None, None
        keep_revisions(out, plan.revisions)
        stages = [plan.inputs(), *plan.stages(_hashes(plan) or {})]
        left = [(stage.name, _left(plan, stage)) for stage in stages]
        plan.save(out / WORK / _PLAN)
        dump_config(config, out / WORK / _SETTINGS)
        file = str(out / WORK / _SETTINGS)
        last = [*_OCTO, "build", file, "--out", str(out)]
        script = render(out / WORK / "slurm", left, [*_OCTO, "work", file, "--out", str(out)], last, workers)
    return script, _submit(script) if shutil.which("sbatch") else None


def _planned(config: DataBuildConfig, out: Path) -> Plan:
    """The plan that was made when the jobs were submitted; one made here where none were."""
    claim(out, config)
    return Plan(config, out, read_json(out / WORK / _PLAN))


def _sizes(inputs: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    return {field: {name: file["bytes"] for name, file in files.items()} for field, files in inputs.items()}


def work_on_share(config: DataBuildConfig, out: Path, stage: str, share: str) -> None:
    """Do the tasks of a stage whose numbers are I modulo N.

    Args:
        config: what is built.
        out: data directory.
        stage: name of the stage.
        share: I/N.

    Raises:
        ConfigError: there is no such stage or share, or the directory is that of another build.
        DataError: the stage before it is not finished, or a build that was started otherwise writes the directory.
        OctoError: as a task raised it.
    """
    number, total = _share(share)
    try:
        with hold(out, _PATIENCE, shared=True):  # so that nobody starts another build, or submits it again
            _work(config, out, stage, number, total)
    except BlockingIOError as error:
        raise being_written(out, error) from None


def _work(config: DataBuildConfig, out: Path, stage: str, number: int, total: int) -> None:
    plan = _planned(config, out.absolute())
    stages = [plan.inputs()]
    hashes = _hashes(plan)
    if stage != stages[0].name:
        if hashes is None:
            raise DataError(
                f"{out}: the input files are not hashed", "the first stage does it", "run the jobs in order"
            )
        stages = plan.stages(hashes)
    found = next((one for one in stages if one.name == stage), None)
    if found is None:
        names = ", ".join(one.name for one in stages)
        raise ConfigError(f"--stage {stage}", f"the stages of this build are {names}", "name one of them")
    for before in stages[: stages.index(found)][-1:]:  # which has looked at the one before it
        if left := _left(plan, before, read=False):  # each of many jobs looks
            raise DataError(
                f"{out}: {left} of {len(before.tasks)} tasks of the stage {before.name} are not done",
                f"{stage} reads what they leave",
                "run the jobs in order, each stage when the one before it is finished",
            )
    use_one_thread()
    run_calls(found, calls_of(found, plan.build.work)[number::total], plan.build.work, InProcess())


def _share(text: str) -> tuple[int, int]:
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal() and int(number) < int(total)):
        raise ConfigError(f"--share {text}", "a share is I/N with I from 0 below N", "write it as 0/8")
    return int(number), int(total)


def _hashes(plan: Plan) -> dict[str, str] | None:
    """Hashes of the input files as far as their stage is done; None where one is missing."""
    facts = [call.done(plan.build.work) for call in calls_of(plan.inputs(), plan.build.work)]
    return None if None in facts else plan.know([found for found in facts if found is not None])


def _left(plan: Plan, stage: Stage, read: bool = True) -> int:
    work = plan.build.work
    return sum(call.number not in stage.skip and call.done(work, read) is None for call in calls_of(stage, work))


def _refuse_queued(out: Path) -> None:
    """Check that no job of an earlier submission waits or runs, as far as this machine can ask the scheduler.

    Raises:
        DataError: one does.
    """
    submitted = out / WORK / SUBMITTED
    ids = submitted.read_text().split() if submitted.is_file() else []
    if not ids or not shutil.which("squeue"):
        return
    done = subprocess.run(["squeue", "-h", "-o", "%A", "-j", ",".join(ids)], capture_output=True, text=True)
    if queued := sorted(set(done.stdout.split())):
        raise DataError(
            f"{out}: jobs of an earlier submission are still in the queue: {', '.join(queued)}",
            "each stage would be done twice",
            f"wait for them to end, or scancel {' '.join(queued)}",
        )


def _submit(script: Path) -> str:
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentProblem(
            f"sbatch refused a job of {script} ({done.stderr.strip().splitlines()[-1:]})",
            fix="set SBATCH_PARTITION and SBATCH_ACCOUNT, or run the script with such options",
        )
    return done.stdout

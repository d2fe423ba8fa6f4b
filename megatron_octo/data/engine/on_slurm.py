"""A build as Slurm jobs: one array a stage, each after the one before, and a last job that publishes."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_octo.files import write_text

SUBMITTED = "submitted.txt"
"""File beside the folder of the jobs with the numbers they have in the queue."""

_MOST_JOBS = 1000  # of one array: Slurm's own default for MaxArraySize is 1001

_JOB = """\
#!/bin/bash
#SBATCH --job-name=octo-data-{name}
#SBATCH --output={log}
#SBATCH --chdir={directory}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --requeue
{array}exec {command}
"""

_SUBMIT = """\
#!/bin/bash
# Submits the jobs of a data build. Options of sbatch may follow: {script} --partition=cpu --time=8:00:00
# Where a job fails, those after it are cancelled; the command that wrote this file renders what is left to do.
set -euo pipefail
id=
submit() {{
  # behind the options given: of two dependencies sbatch takes the last, and a stage never starts before another ends
  id=$(sbatch --parsable "${{@:2}}" ${{id:+--dependency=afterok:$id --kill-on-invalid-dep=yes}} "$1")
  id=${{id%%;*}}
  [ ! -e {submitted} ] || echo "$id" >>{submitted}  # gone where the build is finished already
  echo "$id $1"
}}
: >{submitted}
{lines}
"""


def render(
    folder: Path, stages: Sequence[tuple[str, int]], work: Sequence[str], last: Sequence[str], workers: int | None
) -> Path:
    """Write the files of a build's jobs.

    Args:
        folder: where to; emptied first.
        stages: in order, name and number of tasks that are left; one without tasks gets no job.
        work: command that does a share of a stage; `--stage NAME --share I/N` is added.
        last: command that ends the build.
        workers: how many jobs may run at the same time; None for no limit.

    Returns:
        The script that submits them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    names = []
    for name, tasks in [stage for stage in stages if stage[1]]:
        jobs = min(tasks, _MOST_JOBS)
        limit = f"%{workers}" if workers else ""
        array = f"#SBATCH --array=0-{jobs - 1}{limit}\n"
        command = f'{shlex.join([*work, "--stage", name])} --share "$SLURM_ARRAY_TASK_ID/{jobs}"'
        names.append(_job(folder, len(names) + 1, name, "-%a", array, command))
    names.append(_job(folder, len(names) + 1, "publish", "", "", shlex.join(last)))
    script = folder / "submit.sh"
    submitted = shlex.quote(str(folder.parent / SUBMITTED))
    lines = "\n".join(f'submit {shlex.quote(str(folder / name))} "$@"' for name in names)
    write_text(script, _SUBMIT.format(script=shlex.quote(str(script)), submitted=submitted, lines=lines))
    return script


def _job(folder: Path, number: int, name: str, suffix: str, array: str, command: str) -> str:
    file = f"{number}-{name}.sbatch"
    log, directory = (shlex.quote(str(path)) for path in (folder / "logs" / f"{number}-{name}{suffix}.txt", Path.cwd()))
    write_text(folder / file, _JOB.format(name=name, log=log, directory=directory, array=array, command=command))
    return file

"""Training as one call: load and check the run file, start its processes, wait for them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_octo.checkpoint.store import has_checkpoint, latest_checkpoint, read_facts
from megatron_octo.config.check import check_run
from megatron_octo.config.load import load_config
from megatron_octo.config.recipes import find_recipe
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError
from megatron_octo.files import read_json
from megatron_octo.progress import PROGRESS_VARIABLE, Progress
from megatron_octo.runtime.accelerator import asks_for_accelerator, check, look
from megatron_octo.runtime.stop import STOPPED, nothing_to_save
from megatron_octo.train.describe import describe_end, describe_run
from megatron_octo.train.start import PROFILE, last_step, make_place, plan_start
from megatron_octo.train.statistics import climb_text

_LONG_STEP = 10.0  # seconds without a step after which the bar tells how long this one takes


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file and check every rule.

    Args:
        path: run file; a path under `recipes/` is found in the package when it does not exist here.
        overrides: `dotted.key=value` strings.

    Raises:
        ConfigError: the first field or rule that is wrong.
    """
    run = load_config(RunConfig, find_recipe(path, "runs"), overrides)
    check_run(run)
    return run


def spread_over(path: Path, overrides: list[str], nproc: int) -> list[str]:
    """Overrides that make a run use `nproc` processes: data parallelism is what tensor, pipeline and context leave.

    Raises:
        ConfigError: the run file is wrong, or the processes do not divide.
    """
    parallel = load_config(RunConfig, find_recipe(path, "runs"), overrides).parallel
    ways = parallel.processes // parallel.data
    if nproc % ways:
        raise ConfigError(
            f"--nproc {nproc} is not divisible by parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline} "
            f"x context {parallel.context} = {ways}",
            "data parallelism is what they leave of the processes, a whole number",
            f"start a multiple of {ways}, or change parallel.*",
        )
    return [*overrides, f"parallel.data={nproc // ways}"]


def train_run(path: Path, overrides: list[str] | None = None, until: int | None = None) -> None:
    """Train a run, or go on with it, on this machine; needs no torch in this process (unless
    the run asks for what only some machines have). A finished one is left alone.

    Args:
        path: run file.
        overrides: `dotted.key=value` strings.
        until: stop, with a checkpoint, at this token position of the run.

    Raises:
        ConfigError: the run is wrong, or differs from what trained in its directory before.
        CheckpointError: what it starts from is not there.
        DataError: a source is missing, damaged or too short, or holds tokens the model has no row for.
        EnvironmentProblem: it asks for layers, precision or an optimizer this machine does not have.
        StageFailed: a rank failed; its exit code is kept.
    """
    with nothing_to_save():
        run = load_run(path, overrides)
        if asks_for_accelerator(run):
            check(run, look(load=False))
        start, last = plan_start(run), last_step(run, until)
    if start.step >= last:
        print(f"octo: {describe_end(run, start.step, until, trained=False)}", file=sys.stderr)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from megatron_octo.train.loop import train

        train(run, until)
        return
    from megatron_octo.runtime.launch import launch
    from megatron_octo.train.needs import needs, remarks

    found = remarks(run, start, needs(start.run, start))
    make_place(run.out)
    for line in found:
        print(f"octo: {line}", file=sys.stderr)
    arguments = [str(path), *(overrides or []), *(["--until", str(until)] if until is not None else [])]
    shown = PROGRESS_VARIABLE not in os.environ
    if shown:
        print(describe_run(start.run, start.step, last), file=sys.stderr, flush=True)
    with _mirrored_progress(run, start.step, last) as (environment, watch):
        launch(
            "megatron_octo.train",
            arguments,
            run.parallel.processes,
            run.out,
            run.threads,
            environment=environment,
            watch=watch,
            grace=run.stop_grace_seconds,
            stopped_code=STOPPED,
        )
    times = run.out / PROFILE / "run.txt"
    if shown and times.is_file():
        print(f"\n{times.read_text(encoding='utf-8')}", file=sys.stderr, end="", flush=True)
    if climbed := _climbed(run):
        print(f"octo: warning: {climbed}", file=sys.stderr)
    print(f"octo: {describe_end(run, last, until, trained=True)}", file=sys.stderr)


def _climbed(run: RunConfig) -> str:
    """What the last checkpoint remembers of a loss that climbed; empty if it did not."""
    if not has_checkpoint(run.out):
        return ""
    numbers = read_facts(latest_checkpoint(run.out)).get("memory", {}).get("numbers", {})
    climbed = numbers.get("climbed")
    return climb_text(climbed["loss"], numbers["lowest"], climbed["since"]) if climbed else ""


@contextmanager
def _mirrored_progress(run: RunConfig, step: int, last: int) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """Show here what the ranks, whose output goes to logs, write to a progress file; under a campaign, nothing."""
    if PROGRESS_VARIABLE in os.environ:
        yield {}, lambda: None
        return
    file = run.out / ".progress.json"
    file.unlink(missing_ok=True)
    with Progress(run.name, last * run.tokens_per_step, done=step * run.tokens_per_step, lines=True) as bar:
        moved = time.monotonic()

        def watch() -> None:
            nonlocal moved
            seen = read_json(file)
            if seen and seen["done"] != bar.done:
                moved = time.monotonic()
                bar.advance(seen["done"] - bar.done, **{**seen["facts"], "step_so_far": None})
            elif (waited := time.monotonic() - moved) > _LONG_STEP:
                bar.advance(0, step_so_far=waited)

        yield {PROGRESS_VARIABLE: str(file)}, watch
    file.unlink(missing_ok=True)

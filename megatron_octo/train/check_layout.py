"""Is a difference between layouts normal? The user's layout at tiny width, against what rounding alone produces.

One process trains a tiny model several times: as it is, with each weight moved to a neighbouring number, and with the
batch cut in other micro-batches. These runs differ by rounding and by nothing else: their spread is the envelope. Then
the layout trains the same weights on the same data in as many processes as it needs. A difference inside the envelope
is normal; one outside it is a fault, of megatron-core, of this project, or of the machine.

A bf16 run is checked in fp32 too: there rounding is 60000 times smaller and hides nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_octo.config.layout import ParallelConfig, RecomputeConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import EnvironmentProblem, StageFailed
from megatron_octo.files import read_json
from megatron_octo.progress import PROGRESS_VARIABLE, Progress
from megatron_octo.runtime.launch import launch
from megatron_octo.train.tiny import Case, shrink
from megatron_octo.units import format_bytes

STEPS = 4
_NUDGES = 4
_MARGIN = 5.0
"""A layout may differ this many times as far as the samples of rounding did: they are few."""
_RESOLUTION = 2.0**-22
"""Where no sample differed: two units in the last place of an fp32 number, relative to it."""
_RANK_BYTES = 600 * 2**20  # resident memory of one rank, most of it torch and megatron-core
_QUANTITIES = {"loss": "loss", "norm": "gradient norm"}

Steps = list[dict[str, float]]


@dataclass(frozen=True)
class Finding:
    """One quantity in one precision, at the step where it comes nearest to, or goes furthest over, what is allowed.

    Args:
        precision: "fp32" or "bf16".
        quantity: "loss" or "gradient norm".
        step: counted from 1.
        rounding: largest relative difference that rounding alone produced up to this step.
        allowed: relative difference that is still normal.
        observed: relative difference between the layout and one process.
    """

    precision: str
    quantity: str
    step: int
    rounding: float
    allowed: float
    observed: float

    @property
    def normal(self) -> bool:
        """Whether rounding explains what was observed."""
        return self.observed <= self.allowed


@dataclass(frozen=True)
class LayoutReport:
    """What a check of a layout found.

    Args:
        layout: its short name.
        processes: how many ran it.
        tiny: the model that was trained, in a few words.
        steps: optimizer steps.
        left_out: what of the run was not checked, a sentence each.
        findings: one for each precision and quantity.
    """

    layout: str
    processes: int
    tiny: str
    steps: int
    left_out: list[str]
    findings: list[Finding]

    @property
    def normal(self) -> bool:
        """Whether rounding explains every difference."""
        return all(finding.normal for finding in self.findings)

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        findings = [{**asdict(finding), "normal": finding.normal} for finding in self.findings]
        return {**asdict(self), "findings": findings, "normal": self.normal}

    def verdict(self) -> str:
        """The answer in one line."""
        bad = [finding for finding in self.findings if not finding.normal]
        if not bad:
            return f"normal: {self.layout} differs from one process no more than rounding does"
        worst = [
            f"{one.quantity} in {one.precision} is {one.observed:.1e} away at step {one.step}, "
            f"rounding explains {one.allowed:.1e}"
            for one in bad
        ]
        return f"NOT normal: {self.layout} differs from one process: {'; '.join(worst)}"

    def raise_if_not_normal(self) -> None:
        """End with the verdict where it is a bad one.

        Raises:
            StageFailed: the layout does not train the same model.
        """
        if not self.normal:
            raise StageFailed(
                self.verdict(),
                "every layout computes the same sums, in another order",
                "do not train in this layout; try it with one setting of parallel.* less to find the one at fault",
            )


def check_layout(run: RunConfig, module: str = "megatron_octo.train.trace") -> LayoutReport:
    """Train a tiny model in a run's layout and in one process, on this machine's CPU, and compare.

    Args:
        run: the checked configuration; neither its data nor its directory is touched.
        module: what runs as a rank.

    Raises:
        EnvironmentProblem: not enough memory for the processes.
        StageFailed: a rank failed.
    """
    tiny, left_out = shrink(run)
    _check_memory(tiny.parallel)
    precisions = ["fp32"] if tiny.dtype == "fp32" else ["fp32", tiny.dtype]
    layout = {name: Case(tiny.model_copy(update={"dtype": name}), STEPS) for name in precisions}
    single = {f"{name} {key}": case for name in precisions for key, case in _single(layout[name].run).items()}
    with tempfile.TemporaryDirectory(prefix="octo-layout-") as folder:
        total = STEPS * (len(single) + len(layout))
        with Progress(f"checking {tiny.parallel.label}", total, "steps") as bar:
            alone = _trace(single, 1, Path(folder) / "single", module, bar)
            split = _trace(layout, tiny.parallel.processes, Path(folder) / "layout", module, bar)
    findings = []
    for name in precisions:
        base, *samples = (steps for key, steps in alone.items() if key.startswith(name))
        findings += [_judge(name, key, base, samples, split[name]) for key in _QUANTITIES]
    model = tiny.model
    size = f"{model.family}, {model.layers} layers, hidden {model.hidden}, {model.heads} heads, {model.kv_groups} KV"
    return LayoutReport(tiny.parallel.label, tiny.parallel.processes, size, STEPS, left_out, findings)


def _single(run: RunConfig) -> dict[str, Case]:
    """The run in one process, first as it is, then what differs from it by rounding alone."""
    alone = run.model_copy(
        update={
            "parallel": ParallelConfig(distributed_optimizer=run.parallel.distributed_optimizer),
            "recompute": RecomputeConfig(),
        }
    )
    cases = {"as it is": Case(alone, STEPS)}
    cases |= {f"nudge {seed}": Case(alone, STEPS, nudge=seed) for seed in range(_NUDGES)}
    for micro in sorted({1, run.batch.global_batch} - {run.batch.micro_batch}):
        batch = run.batch.model_copy(update={"micro_batch": micro})
        cases[f"micro-batch {micro}"] = Case(alone.model_copy(update={"batch": batch}), STEPS)
    return cases


def _trace(cases: dict[str, Case], nproc: int, folder: Path, module: str, bar: Progress) -> dict[str, Steps]:
    folder.mkdir()
    file = folder / "cases.json"
    file.write_text(json.dumps({name: case.dump() for name, case in cases.items()}), encoding="utf-8")
    with _followed(folder / "progress.json", bar) as watch:
        launch(
            module,
            [str(file), str(folder)],
            nproc,
            folder,
            threads=1,
            environment={"CUDA_VISIBLE_DEVICES": "", PROGRESS_VARIABLE: str(folder / "progress.json")},
            watch=watch,
        )
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in cases}


@contextmanager
def _followed(file: Path, bar: Progress) -> Iterator[Any]:
    """A function that moves the bar on by what the ranks have written since."""
    start = bar.done

    def watch() -> None:
        seen = read_json(file)
        if seen:
            bar.advance(start + seen["done"] - bar.done)

    yield watch
    watch()


def _judge(precision: str, quantity: str, base: Steps, samples: list[Steps], layout: Steps) -> Finding:
    """Compare a quantity step by step; differences grow with the steps, so an envelope never narrows."""
    findings, rounding = [], 0.0
    for step, (mine, one) in enumerate(zip(layout, base, strict=True)):
        rounding = max([rounding, *(_away(sample[step][quantity], one[quantity]) for sample in samples)])
        observed = _away(mine[quantity], one[quantity])
        allowed = max(_MARGIN * rounding, _RESOLUTION)
        findings.append(Finding(precision, _QUANTITIES[quantity], step + 1, rounding, allowed, observed))
    return max(findings, key=lambda finding: finding.observed / finding.allowed)


def _away(value: float, reference: float) -> float:
    """Relative difference; infinite where a value is not a finite number."""
    away = abs(value - reference) / abs(reference)
    return away if math.isfinite(away) else math.inf


def _check_memory(parallel: ParallelConfig) -> None:
    """Refuse more processes than this machine can hold (Linux tells)."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return
    free = next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable")), None)
    needed = parallel.processes * _RANK_BYTES
    if free is not None and needed > free:
        raise EnvironmentProblem(
            f"{parallel.label} needs {parallel.processes} processes, about {format_bytes(needed)} of memory; "
            f"{format_bytes(free)} are free",
            "each process of the layout runs here, with a tiny model",
            "check a smaller layout of the same kind, e.g. parallel.tensor=2 parallel.pipeline=2",
        )

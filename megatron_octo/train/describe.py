"""What a run is about to do, in a few lines for people. Needs no torch."""

from __future__ import annotations

from megatron_octo.checkpoint.store import CHECKPOINTS, step_name
from megatron_octo.config.run import RunConfig
from megatron_octo.model.facts import FLOPS_CONVENTION, flops_per_token, parameter_count
from megatron_octo.units import format_flops, format_tokens


def describe_run(run: RunConfig, step: int, last: int) -> str:
    """Name, model, layout, precision, work and start of a run, a line each.

    Args:
        run: the run.
        step: steps already taken.
        last: the step this process ends with.
    """
    model, count = run.model, run.parallel.processes
    processes = f", {count} processes" if count > 1 else ""
    flops = format_flops(flops_per_token(model, run.data.sequence_length))
    tokens, steps = format_tokens(run.tokens_per_step), f"{run.steps:,} steps"
    leg = "" if last == run.steps else f", until step {last:,} now"
    rows = {
        "model": f"{model.family}, {format_tokens(parameter_count(model))} parameters, {model.layers} layers",
        "layout": f"{run.parallel.label}{processes}, {_precision(run)}",
        "work": f"{tokens} tokens/step x {steps} = {format_tokens(run.tokens_per_step * run.steps)} tokens{leg}",
        "FLOPs": f"{flops}FLOP/token: {FLOPS_CONVENTION}",
        "start": _origin(run, step),
        **_mixtures(run),
        "out": str(run.out),
    }
    return "\n".join([run.name, *(f"  {name:<8}{text}" for name, text in rows.items())])


def describe_end(run: RunConfig, step: int, until: int | None, *, trained: bool) -> str:
    """Where a leg of a run stands when its command ends: what is done, what is saved, and what goes on.

    Args:
        run: the run.
        step: steps taken.
        until: the position the leg was to stop at, tokens of the run.
        trained: whether this command took a step.
    """
    tokens = format_tokens(min(step * run.tokens_per_step, run.schedule.tokens))
    over = step >= run.steps
    said = ("finished" if over else "stopped as --until says") if trained else "nothing to do"
    saved = f", saved as {run.out / CHECKPOINTS / step_name(step)}" if step else ""
    if over:
        more = "; a larger schedule.tokens goes on" if not trained else ""
    else:
        more = f"; --until {until} is already reached" if not trained else "; the same command without --until goes on"
    note = f" (--until {until} lies beyond the end)" if until is not None and until > run.schedule.tokens else ""
    return f"{run.name}: {said}: step {step:,} of {run.steps:,}, {tokens} tokens{saved}{more}{note}"


def _mixtures(run: RunConfig) -> dict[str, str]:
    """Of the data what a reader of the run file may not expect: other mixtures later, and sources that are missing."""
    lines = []
    for phase in run.data.phases or []:
        shares = ", ".join(f"{name} {source.weight:g}" for name, source in phase.mixture.items())
        lines.append(f"from {format_tokens(phase.at)} tokens on: {shares}")
    for name, place in (run.data.replaced or {}).items():
        lines.append(f"{name} was missing when the run began: {place} has its weight")
    return {"data": "; ".join(lines)} if lines else {}


def _precision(run: RunConfig) -> str:
    if run.fp8 is None:
        return run.dtype
    return f"{run.dtype} with FP8 {run.fp8.recipe} ({run.fp8.format})"


def _origin(run: RunConfig, step: int) -> str:
    if step:
        return f"goes on after step {step:,} ({format_tokens(step * run.tokens_per_step)} tokens)"
    if run.start.fork is not None:
        at = "its latest checkpoint" if run.start.fork.at is None else f"{format_tokens(run.start.fork.at)} tokens"
        return f"branch of {run.start.fork.parent} at {at}"
    if run.start.checkpoint is not None:
        return f"weights of {run.start.checkpoint}"
    return f"random weights, seed {run.seed}"

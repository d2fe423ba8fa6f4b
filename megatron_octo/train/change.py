"""What may change between two starts of one run, and configurations of earlier versions. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_octo.checkpoint.store import FACTS
from megatron_octo.config.blends import Blend, blends_of, read_so_far
from megatron_octo.config.load import differences, parse_config
from megatron_octo.config.mixture import Source
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.digest import tokenizer_digest
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.mix.identity import content_digest
from megatron_octo.data.mix.replace import apply
from megatron_octo.errors import CheckpointError, ConfigError, DataError
from megatron_octo.schedule.change import rewritten_past

_MAY_CHANGE = (
    "parallel", "batch.micro_batch", "recompute", "fp8", "transformer_impl", "optimizer.implementation", "checkpoint",
    "watch", "validation", "logging", "threads", "timeout_minutes", "stop_grace_seconds", "out",
)  # fmt: skip
_MUST_STAY = "parallel.distributed_optimizer"
# What a source is called elsewhere, and rules for sources that were there when the run began, decide nothing any more.
_SAYS_ONLY = re.compile(r"data\.mixture\..*\.corpora|data\.replace(\..*)?")


def stored_run(facts: dict[str, Any], checkpoint: Path) -> RunConfig:
    """The configuration a checkpoint was trained with; a field that is newer than it has its default.

    Raises:
        CheckpointError: it has a field or value that this version does not know.
    """
    try:
        return parse_config(RunConfig, facts.get("config") or {}, "config")
    except ConfigError as error:
        wrote = (facts.get("versions") or {}).get("megatron_octo", "another version")
        raise CheckpointError(
            f"{checkpoint / FACTS}: {error.what}",
            f"it was written by megatron_octo {wrote}, whose configuration this version cannot read",
            "go on with that version, or start a new run from this checkpoint: start.checkpoint",
        ) from None


def continued(run: RunConfig, facts: dict[str, Any], checkpoint: Path) -> RunConfig:
    """A run as it goes on from its checkpoint: the rate it took from its parent, if it states none, is its own now.

    Raises:
        ConfigError: a field differs that may not change, or the past of the schedule or of the mixtures would.
        CheckpointError: see `stored_run`.
    """
    before = stored_run(facts, checkpoint)
    if run.schedule.learning_rate is None:
        rate = before.schedule.learning_rate
        run = run.model_copy(update={"schedule": run.schedule.model_copy(update={"learning_rate": rate})})
    run = run.model_copy(update={"data": apply(run.data, before.data.replaced or {})})
    known = with_moved_data(before, run, facts)
    changed = differences(known.model_dump(mode="json"), run.model_dump(mode="json"))
    schedule = [line for line in changed if line.startswith("schedule.")]
    phases = [line for line in changed if line.startswith("data.phases")]
    other = [line for line in changed if line not in (*schedule, *phases) and not _allowed(line)]
    place = checkpoint.parent.parent
    if other:
        raise ConfigError(
            f"{place}: this run has trained with other settings: {'; '.join(other)}",
            "a run goes on with its own data order and model; layout, precision (fp8), layers (transformer_impl), "
            "checkpoints, watching and logging may change, "
            "and of the schedule and data.phases what is still to come",
            "restore these fields, or choose another `out` for a new run",
        )
    if phases:
        _check_phases(known, run, facts, place)
    if schedule:
        why = rewritten_past(before.schedule, run.schedule, facts["run_tokens"], run.tokens_per_step)
        if why is not None:
            raise ConfigError(
                f"{place}: this run has trained with another schedule: {'; '.join(schedule)}: {why}",
                "of a schedule only what is still to come may change: a stable stretch may become longer, a decay "
                "that has not begun may move",
                "restore it, or fork from a checkpoint before the decay",
            )
    return run


def with_moved_data(before: RunConfig, run: RunConfig, facts: dict[str, Any]) -> RunConfig:
    """A stored configuration with the places where its data lies now, as far as it is the same data.

    Args:
        before: what a checkpoint was trained with.
        run: where the data lies now.
        facts: of the checkpoint; `data` and `tokenizer` tell what was read.
    """
    data, known, there = before.data, facts.get("data", {}), run.data.paths
    moved = {
        name: there[name]
        for name, path in data.paths.items()
        if there.get(name, path) != path and isinstance(known.get(name), dict) and _digest(there[name]) == known[name]
    }
    changes: dict[str, Any] = {"mixture": _placed(data.mixture, moved)}
    if data.phases:
        changes["phases"] = [
            phase.model_copy(update={"mixture": _placed(phase.mixture, moved)}) for phase in data.phases
        ]
    if facts.get("tokenizer") and facts["tokenizer"] == tokenizer_digest(run.data.tokenizer):
        changes["tokenizer"] = run.data.tokenizer
    return before.model_copy(update={"data": data.model_copy(update=changes)})


def _placed(mixture: dict[str, Source], moved: dict[str, Path]) -> dict[str, Source]:
    return {
        name: source.model_copy(update={"path": moved[name]}) if name in moved else source
        for name, source in mixture.items()
    }


def _digest(prefix: Path) -> dict[str, str] | None:
    try:
        return content_digest(read_index(prefix))
    except DataError:
        return None


def check_data(run: RunConfig, before: dict[str, Any], now: dict[str, dict[str, str]]) -> None:
    """Check that a run reads on in the datasets it has read so far, not in others under the same path.

    Args:
        run: where they are.
        before: what told each source from others when the last checkpoint was saved: see `content_digest`, or of
            earlier versions that of the index alone; empty if nothing was read.
        now: the same, of what is there; sources that are not read any more are not among them.

    Raises:
        DataError: another index, which means another order of windows; or other tokens.
    """
    for name in before.keys() & now.keys():
        known = before[name] if isinstance(before[name], dict) else {"index": before[name]}
        found, place = now[name], f"data.mixture.{name} ({run.data.paths[name]})"
        if known["index"] != found["index"]:
            raise DataError(
                f"{place} is not the dataset that '{run.name}' has read",
                "the order of windows follows from the lengths of all documents: tokens would be lost or read twice",
                f"put the one back whose .idx has SHA-256 {known['index']}, or start a new run, or a fork with "
                "data: fresh",
            )
        if known.get("tokens", found["tokens"]) != found["tokens"]:
            raise DataError(
                f"{place} holds other tokens than those that '{run.name}' has read, in documents of the same lengths",
                "a .bin that was copied in part, or tokens of another tokenizer, would be read without an error",
                "copy its .bin again, or start a new run, or a fork with data: fresh",
            )


def refuse_renamed(run: RunConfig, before: RunConfig, facts: dict[str, Any], past: Sequence[Blend]) -> None:
    """Check that no dataset that was read comes again under a name that is new: its windows count by its name.

    Args:
        run: what reads on.
        before: what has read, its data where it lies now.
        facts: of the checkpoint; `data` tells what was read.
        past: the blends that were read.

    Raises:
        ConfigError: a new name has the path of a dataset that was read, or what it names is a copy of it.
    """
    names = sorted({name for blend in past for name in blend.weights})
    paths = {before.data.paths[name].resolve(): name for name in names if name in before.data.paths}
    known = {name: facts.get("data", {}).get(name) for name in names}
    digests = {json.dumps(one, sort_keys=True): name for name, one in known.items() if isinstance(one, dict)}
    for name in sorted(run.data.paths.keys() - before.data.paths.keys() - set(names)):
        path = run.data.paths[name]
        old = paths.get(path.resolve()) or (digests.get(json.dumps(_digest(path), sort_keys=True)) if digests else None)
        if old is not None:
            raise ConfigError(
                f"'{run.name}' reads on, and calls {name} ({path}) what '{before.name}' has read as {old}",
                "windows of a dataset count by its name: under another one they would be read a second time",
                f"call it {old} again; a branch may also begin anew: start.fork.data: fresh",
            )


def _check_phases(before: RunConfig, run: RunConfig, facts: dict[str, Any], place: Path) -> None:
    """Mixtures that begin where the run stands, or later, may change: no window of theirs was read."""
    begun = (facts.get("lineage") or {}).get("first_window", 0)
    read = begun + facts["step"] * run.batch.global_batch
    past, now = (read_so_far(blends_of(one.data, begun), read) for one in (before, run))
    moved = [name for blend in past for name in blend.weights if run.data.paths.get(name) != before.data.paths[name]]
    if past != now or moved:
        raise ConfigError(
            f"{place}: this run has trained with other mixtures: "
            + "; ".join(differences(before.data.model_dump(mode="json"), run.data.model_dump(mode="json"), "data")),
            f"{facts['run_tokens']} tokens of it are read; a mixture may only change from there on",
            f"restore the phases that begin before, and give a new one at: {facts['run_tokens']} or later",
        )
    refuse_renamed(run, before, facts, past)


def _allowed(line: str) -> bool:
    field = line.split(":", 1)[0]
    return (field.startswith(_MAY_CHANGE) and field != _MUST_STAY) or _SAYS_ONLY.fullmatch(field) is not None

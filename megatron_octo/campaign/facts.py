"""A campaign's figures, as `report.json` states them; the page shows these and no others."""

from __future__ import annotations

import re
from itertools import groupby
from statistics import fmean, median
from typing import Any

from megatron_octo.campaign.machine import describe_machine
from megatron_octo.campaign.record import Branch, Record, Run, look, number

FORMAT = 1
"""Version of report.json's layout."""

LOSS_WINDOW = 10
"""Steps averaged into `mean_last_loss`."""

REWARD_WINDOW = 3
"""Rollout steps averaged into the first and last mean reward."""

_ORDER = ("data", "start", "stable")
_TAIL = ("convert", "evaluate-base", "rl", "evaluate-rl")
_MEASURES = ("accuracy", "low", "high", "response_length", "format_rate", "stop_rate", "samples_per_problem")


def build_facts(record: Record) -> dict[str, Any]:
    """Work out everything the report states.

    Args:
        record: the campaign directory as read.

    Returns:
        A mapping of plain JSON values without NaN. What is not known is null, never guessed.
    """
    stages = _stages(record)
    branches = {branch.name: _branch(branch) for branch in record.branches}
    missing = _missing(record, stages)
    machine = record.machine or describe_machine()
    return {
        "format": FORMAT,
        "name": record.name,
        "seed": number(record.config.get("seed")),
        "complete": not missing,
        "missing": missing,
        "notes": record.notes + _notes(record, branches),
        "wall_seconds": sum(stage["wall_seconds"] for stage in stages.values()),
        "data": _data(record.manifest),
        "stages": stages,
        "branches": branches,
        "hardware": {**machine.get("hardware", {}), "recorded": "by the campaign" if record.machine else "by the report"},
        "versions": {**machine.get("versions", {}), **(look(record.stable.facts, "versions") or {})},
        "hashes": _hashes(record),
    }


def _stages(record: Record) -> dict[str, Any]:
    branches = [branch.name for branch in record.branches]
    order = [*_ORDER, *branches, *_TAIL]
    runs = {run.name: run for run in record.runs}
    groups: dict[str, list[str]] = {}
    for state in record.states:
        # The stable stage may have run in legs, one layout each: stable-1, stable-2, ...
        groups.setdefault("stable" if re.fullmatch(r"stable(-\d+)?", state) else state, []).append(state)
    names = {run.name for run in record.runs if run.rows} | groups.keys()
    ordered = sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: _stage(record, groups.get(name, []), runs.get(name)) for name in ordered}


def _stage(record: Record, states: list[str], run: Run | None) -> dict[str, Any]:
    read = {name: record.states[name] for name in states}
    seconds = {name: number(state.get("seconds")) or 0.0 for name, state in read.items()}
    facts: dict[str, Any] = {
        "status": _status([str(state.get("status")) for state in read.values()]),
        "wall_seconds": sum(seconds.values()),
        "attempts": sum(number(state.get("attempts")) or 0 for state in read.values()),
    }
    if len(read) > 1:
        facts["parts"] = seconds
    return {**facts, **_training(run)} if run is not None and run.rows else facts


def _status(statuses: list[str]) -> str:
    for status in ("failed", "running", "waiting"):
        if status in statuses:
            return status
    return statuses[0] if statuses else "unknown"


def _training(run: Run) -> dict[str, Any]:
    losses = _column(run.rows, "loss")
    last = run.rows[-1]
    return {
        "steps": number(last.get("step")),
        "tokens": number(last.get("run_tokens")),
        "position": number(last.get("tokens")),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "mean_last_loss": fmean(losses[-LOSS_WINDOW:]) if losses else None,
        "bad_steps": len(run.rows) - len(losses),
        "tokens_per_second": _or_none(median, _column(run.rows, "tokens_per_second")),
        "layouts": layouts(run),
    }


def layouts(run: Run) -> list[dict[str, Any]]:
    """The stretches of a run trained on one layout: `{"label", "from", "to"}`, token positions."""
    found: list[dict[str, Any]] = []
    first = run.rows[0] if run.rows else {}
    begin = (number(first.get("tokens")) or 0) - (number(first.get("run_tokens")) or 0)
    for label, rows in groupby(run.rows, key=lambda row: str(row.get("layout", "not recorded"))):
        end = list(rows)[-1]["tokens"]
        found.append({"label": label, "from": found[-1]["to"] if found else begin, "to": end})
    return found


def _branch(branch: Branch) -> dict[str, Any]:
    before, after = _evaluation(branch.before), _evaluation(branch.after)
    return {
        "fork": _fork(branch.run),
        "certificate": _certificate(branch.certificate),
        "rl": _rl(branch.rl),
        "problems": look(before, "problems") or look(after, "problems"),
        "before": before,
        "after": after,
        "response_length": {when: look(side, "greedy/response_length") for when, side in _sides(before, after)},
        "change": {kind: _change(before, after, kind) for kind in ("greedy", "sampled")},
    }


def _sides(before: Any, after: Any) -> tuple[tuple[str, Any], ...]:
    return (("before", before), ("after", after))


def _fork(run: Run) -> dict[str, Any] | None:
    if not run.lineage and not run.rows:
        return None
    parent = look(run.lineage, "parent")
    stated = number(look(run.lineage, "tokens", "position", "at", "fork/tokens"))
    begin = layouts(run)[0]["from"] if run.rows else None
    return {
        "parent": str(parent).rstrip("/").rpartition("/")[2] if parent else None,
        "tokens": stated if stated is not None else begin,
        "carried": look(run.lineage, "carried"),
    }


def _certificate(certificate: dict[str, Any] | None) -> dict[str, Any] | None:
    if certificate is None:
        return None
    return {
        "valid": certificate.get("valid") is True,
        "tensors": number(look(certificate, "coverage/tensors", "coverage/total", "tensors")),
        "covered": number(look(certificate, "coverage/covered", "covered")),
        "bitwise": look(certificate, "roundtrip/bitwise", "round_trip/bitwise", "bitwise"),
        "max_abs_difference": number(look(certificate, "logits/max_abs_difference")),
        "kl": number(look(certificate, "logits/kl")),
        "greedy_match": number(look(certificate, "logits/greedy_match")),
    }


def _rl(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    rewards = _column(rows, "reward")
    lengths = _column(rows, "response_length")
    return {
        "steps": rows[-1]["step"],
        "first_reward": _or_none(fmean, rewards[:REWARD_WINDOW]),
        "last_reward": _or_none(fmean, rewards[-REWARD_WINDOW:]),
        "first_response_length": _or_none(fmean, lengths[:REWARD_WINDOW]),
        "last_response_length": _or_none(fmean, lengths[-REWARD_WINDOW:]),
    }


def _evaluation(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    sides: dict[str, Any] = {"problems": number(look(values, "n_problems", "problems"))}
    for kind in ("greedy", "sampled"):
        sides[kind] = {name: number(look(values, f"{kind}/{name}")) for name in _MEASURES}
    return sides


def _change(before: Any, after: Any, kind: str) -> dict[str, Any] | None:
    old, new = look(before, kind) or {}, look(after, kind) or {}
    if old.get("accuracy") is None or new.get("accuracy") is None:
        return None
    known = None not in (old["low"], old["high"], new["low"], new["high"])
    apart = (new["low"] > old["high"] or new["high"] < old["low"]) if known else None
    return {"accuracy": new["accuracy"] - old["accuracy"], "intervals_apart": apart}


def _data(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    sources = manifest.get("sources")
    named = sources.items() if isinstance(sources, dict) else ((look(s, "name"), s) for s in sources or [])
    counts = {
        str(name): {kind: number(look(source, kind)) for kind in ("documents", "tokens")} for name, source in named
    }
    totals = {kind: [count[kind] for count in counts.values()] for kind in ("documents", "tokens")}
    summed = {kind: None if None in parts else sum(parts) for kind, parts in totals.items()}
    return {**summed, "sources": counts}


def _missing(record: Record, stages: dict[str, Any]) -> list[str]:
    """What a finished campaign would have and this directory has not, in words, in the campaign's order."""
    missing = [] if record.manifest else ["data manifest"]
    missing += [f"training metrics of {run.name}" for run in record.runs if not run.rows]
    if not record.branches:
        missing.append("branches")
    for branch in record.branches:
        parts = {"certificate": branch.certificate, "evaluation before RL": branch.before}
        if record.wants_rl:
            parts |= {"RL metrics": branch.rl, "evaluation after RL": branch.after}
        missing += [f"{part} of {branch.name}" for part, found in parts.items() if not found]
    unfinished = [name for name, stage in stages.items() if stage["status"] not in ("done", "unknown")]
    return missing + [f"stage {name} is {stages[name]['status']}" for name in unfinished]


def _notes(record: Record, branches: dict[str, Any]) -> list[str]:
    notes = []
    for run in record.runs:
        bad = len(run.rows) - len(_column(run.rows, "loss"))
        if bad:
            notes.append(f"{run.name}: {bad} of {len(run.rows)} steps have no finite loss")
    for name, branch in branches.items():
        counts = {look(branch, f"{when}/problems") for when in ("before", "after")} - {None}
        if len(counts) > 1:
            notes.append(f"{name}: evaluated on different numbers of problems before and after RL")
    if record.machine is None:
        notes.append("the campaign recorded no machine.json: hardware and versions are of the machine that wrote this report")
    return notes


def _hashes(record: Record) -> dict[str, str]:
    hashes = dict(record.hashes)
    for run in record.runs:
        hashes.update(run.hashes)
    for branch in record.branches:
        hashes.update(branch.hashes)
    return hashes


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    values = (number(row.get(name)) for row in rows)
    return [value for value in values if value is not None]


def _or_none(function: Any, values: list[float]) -> float | None:
    return function(values) if values else None

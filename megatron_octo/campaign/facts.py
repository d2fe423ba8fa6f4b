"""A campaign's figures, as `report.json` states them; the page shows these and no others."""

from __future__ import annotations

import math
import re
from itertools import groupby
from statistics import fmean, median
from typing import Any

from megatron_octo.campaign.machine import describe_machine
from megatron_octo.campaign.record import Branch, Record, Run, look_number, number
from megatron_octo.campaign.samples import all_pairs
from megatron_octo.page.markup import look

FORMAT = 1
"""Version of report.json's layout."""

LOSS_WINDOW = 10
"""Steps averaged into `mean_last_loss`."""

REWARD_WINDOW = 3
"""Rollout steps averaged into the first and last mean reward."""

_ORDER = ("data", "start", "stable")
_TAIL = ("convert", "evaluate-base", "rl", "evaluate-rl")
_MEASURES = {name: (name,) for name in ("accuracy", "low", "high", "format_rate", "stop_rate", "samples_per_problem")}
_MEASURES["response_length"] = ("mean_response_tokens", "response_length")


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
    facts = {
        "format": FORMAT,
        "name": record.name,
        "seed": number(record.config.get("seed")),
        "complete": not missing,
        "missing": missing,
        "notes": record.notes + _notes(record, branches),
        "wall_seconds": sum(stage["wall_seconds"] for stage in stages.values()),
        "data": _data(record.manifest),
        "mixtures": _mixtures(record),
        "stages": stages,
        "branches": branches,
        "certificates": {
            "valid": sum(look(branch, "certificate/valid") is True for branch in branches.values()),
            "branches": len(branches),
        },
        "hardware": _hardware(_mapping(machine, "hardware"), bool(record.machine)),
        "versions": {**_mapping(machine, "versions"), **_mapping(record.stable.facts, "versions")},
        "hashes": _hashes(record),
    }
    return _without_nan(facts)


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
    if run is None or not run.rows:
        return facts
    planned = look(record.config, "stable/tokens" if run.name == "stable" else f"branches/{run.name}/tokens")
    return {**facts, **_training(run), "planned_tokens": number(planned)}


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
        "response_length": {when: look(side, "sampled/response_length") for when, side in _sides(before, after)},
        "change": {kind: _change(before, after, kind) for kind in ("greedy", "sampled")},
        "greedy_problem_by_problem": _problem_by_problem(branch),
    }


def _sides(before: Any, after: Any) -> tuple[tuple[str, Any], ...]:
    return (("before", before), ("after", after))


def _fork(run: Run) -> dict[str, Any] | None:
    if not run.rows:
        return None
    stated = number(look(run.lineage, "position"))
    return {
        "parent": look(run.lineage, "parent_run"),
        "tokens": stated if stated is not None else layouts(run)[0]["from"],
        "learning_rate": number(look(run.lineage, "learning_rate")),
        "carried": look(run.lineage, "carried"),
    }


def _certificate(certificate: dict[str, Any] | None) -> dict[str, Any] | None:
    if certificate is None:
        return None
    checks = [part for part in certificate.values() if isinstance(part, dict) and "passed" in part]
    return {
        "valid": certificate.get("valid") is True,
        "checks": len(checks) or None,
        "checks_passed": sum(check["passed"] is True for check in checks) if checks else None,
        "failed": certificate.get("failed"),
        "tensors": look_number(certificate, "coverage/tensors"),
        "covered": look_number(certificate, "coverage/covered"),
        "bitwise": look(certificate, "round_trip/bitwise"),
        "max_abs_difference": look_number(certificate, "logits/max_abs_difference"),
        "kl": look_number(certificate, "logits/kl"),
        "greedy_match": look_number(certificate, "logits/greedy_match"),
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
    count = look_number(values, "n_problems", "problems/n_problems", "greedy/n_problems", "sampled/n_problems")
    sides: dict[str, Any] = {"problems": count}
    for kind in ("greedy", "sampled"):
        part = look(values, kind)
        sides[kind] = {name: look_number(part, *paths) for name, paths in _MEASURES.items()}
    return sides


def _change(before: Any, after: Any, kind: str) -> dict[str, Any] | None:
    old, new = look(before, kind) or {}, look(after, kind) or {}
    if old.get("accuracy") is None or new.get("accuracy") is None:
        return None
    known = None not in (old["low"], old["high"], new["low"], new["high"])
    apart = (new["low"] > old["high"] or new["high"] < old["low"]) if known else None
    return {"accuracy": new["accuracy"] - old["accuracy"], "intervals_apart": apart}


def _problem_by_problem(branch: Branch) -> dict[str, Any] | None:
    """How greedy verdicts moved on the same problems, and how likely so lopsided a move is by chance (sign test)."""
    pairs = [pair for pair in all_pairs(branch) if pair.before and pair.after]
    verdicts = [(pair.before.right, pair.after.right) for pair in pairs if pair.before and pair.after]
    if not verdicts or any(None in each for each in verdicts):
        return None
    right, wrong = verdicts.count((False, True)), verdicts.count((True, False))
    moved = right + wrong
    tail = sum(math.comb(moved, k) for k in range(min(right, wrong) + 1)) / 2**moved
    return {"compared": len(verdicts), "became_right": right, "became_wrong": wrong, "p_value": min(1.0, 2 * tail)}


def _data(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    counts = {
        name: {kind: number(look(source, kind)) for kind in ("documents", "tokens", "unigram_entropy")}
        for name, source in _mapping(manifest, "sources").items()
    }
    totals = {kind: [count[kind] for count in counts.values()] for kind in ("documents", "tokens")}
    summed = {kind: None if None in parts else sum(parts) for kind, parts in totals.items()}
    problems = {split: number(look(manifest, f"problems/{split}/count")) for split in ("train", "heldout")}
    return {
        **summed,
        "sources": counts,
        "problems": problems,
        "vocabulary": number(look(manifest, "tokenizer/vocabulary")),
    }


def _mixtures(record: Record) -> dict[str, dict[str, float]]:
    """Share of each source in each stage's mixture, from the configured weights."""
    sections = {"stable": look(record.config, "stable/mixture")}
    sections |= {branch.name: look(record.config, f"branches/{branch.name}/mixture") for branch in record.branches}
    shares = {}
    for stage, weights in sections.items():
        known = {str(k): number(v) for k, v in weights.items()} if isinstance(weights, dict) else {}
        total = sum(weight or 0 for weight in known.values())
        if total > 0 and None not in known.values():
            shares[stage] = {name: (weight or 0) / total for name, weight in known.items()}
    return shares


def _missing(record: Record, stages: dict[str, Any]) -> list[str]:
    """What a finished campaign would have and this directory has not, in words, in the campaign's order."""
    missing = [f"stage {n}: {s['status']}" for n, s in stages.items() if s["status"] not in ("done", "unknown")]
    missing += [] if record.manifest else ["data manifest"]
    missing += _without("training metrics", {run.name: run.rows for run in record.runs})
    for name, stage in stages.items():
        tokens, planned = stage.get("tokens") or 0, stage.get("planned_tokens") or 0
        missing += [f"{planned - tokens:,} of {planned:,} tokens of {name}"] if tokens < planned else []
    missing += [] if record.branches else ["branches"]
    for what, part in _PARTS.items():
        if record.wants_rl or part not in ("rl", "after"):
            missing += _without(what, {branch.name: getattr(branch, part) for branch in record.branches})
    return missing


_PARTS = {
    "certificate": "certificate",
    "evaluation before RL": "before",
    "RL metrics": "rl",
    "evaluation after RL": "after",
}


def _without(what: str, parts: dict[str, Any]) -> list[str]:
    names = [name for name, part in parts.items() if not part]
    return [f"{what} of {', '.join(names)}"] if names else []


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
        notes.append(
            "the campaign recorded no machine.json: hardware and versions are of the machine that wrote this report"
        )
    return notes


def _hashes(record: Record) -> dict[str, str]:
    hashes = dict(record.hashes)
    for run in record.runs:
        hashes.update(run.hashes)
    for branch in record.branches:
        hashes.update(branch.hashes)
    return hashes


def _hardware(stated: dict[str, Any], by_campaign: bool) -> dict[str, Any]:
    gpus = stated.get("gpus")
    return {
        "cpu": str(stated["cpu"]) if stated.get("cpu") else None,
        "cores": number(stated.get("cores")),
        "memory_bytes": number(stated.get("memory_bytes")),
        "gpus": [str(gpu) for gpu in gpus] if isinstance(gpus, list) else [],
        "recorded": "by the campaign" if by_campaign else "by the report",
    }


def _without_nan(value: Any) -> Any:
    """The same value with null in place of every NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return number(value) if isinstance(value, float) else value


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    values = (number(row.get(name)) for row in rows)
    return [value for value in values if value is not None]


def _or_none(function: Any, values: list[float]) -> float | None:
    return function(values) if values else None

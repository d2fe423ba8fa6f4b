"""The family of a run: who forked from whom, at which token, carrying what.

A branch names its parent (`lineage.json`), and leaves a record in its parent (`forks/`): a family is found from any of
its members, and a run that was moved or removed still has its place in it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_octo.checkpoint.store import has_checkpoint, latest_checkpoint, read_facts
from megatron_octo.config.load import parse_config, read_yaml
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import CheckpointError, OctoError
from megatron_octo.files import LOCK, is_held, read_json
from megatron_octo.schedule.fork import FORKS, LINEAGE

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
_LAST_LINE = 1 << 14  # bytes; a metrics line is far shorter


@dataclass
class Member:
    """One run of a family.

    Args:
        run: its name.
        directory: where it is; where it was, for one that is not there.
        state: training, finished, stopped (short of its length), or missing.
        position: tokens since the root at which it left its parent; 0 for a root.
        tokens: its own so far.
        planned: its own in all.
        learning_rate: on both sides of the seam; None for a root.
        carried: what it took along: weights, moments, rng, data; None for a root.
        checkpoint: the parent's that it left from; None for a root.
        pinned: whether the parent knows, and keeps that checkpoint; None for a root.
        problem: what is wrong with its files.
        asked: whether it is the run that was asked for.
        children: runs that forked from it, by position.
    """

    run: str
    directory: str | None
    state: str
    position: int = 0
    tokens: int | None = None
    planned: int | None = None
    learning_rate: float | None = None
    carried: dict[str, Any] | None = None
    checkpoint: str | None = None
    pinned: bool | None = None
    problem: str | None = None
    asked: bool = False
    children: list[Member] = field(default_factory=list)


def families(directory: Path) -> list[Member]:
    """The trees a directory belongs to, or holds.

    Args:
        directory: a run directory: the one tree it is part of is found through its records and its neighbours. Any
            other directory: the trees of all runs below it.

    Returns:
        The roots. A parent that is not where its branch left it is searched among the runs found and otherwise shown
        as missing; so is a branch that its parent knows of.

    Raises:
        CheckpointError: no such directory, no run in it, or records that go round in a circle.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory", fix="check the path")
    here = directory.resolve()
    runs = _gather(here)
    if not runs:
        raise CheckpointError(
            f"{directory}: not a run directory, and holds none", f"a run directory holds a {CONFIG}", "check the path"
        )
    roots = _Tree(runs, here).roots()
    mine = [root for root in roots if here not in runs or _holds(root, here)]
    if not mine:
        raise CheckpointError(f"{directory}: its ancestors go round in a circle", f"look at the {LINEAGE} of each run")
    return mine


@dataclass
class _Run:
    """What the files of one run directory say."""

    directory: Path
    name: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    forks: list[dict[str, Any]]
    problem: str | None

    @property
    def chain(self) -> list[dict[str, Any]]:
        """Ancestors, nearest first: run, path, and the position where its child left it."""
        return self.lineage.get("ancestors") or []

    def knows(self, child: str, position: int) -> bool:
        """Whether a branch of this name left a record here."""
        return any(fork.get("run") == child and fork.get("position") == position for fork in self.forks)


class _Tree:
    """Members by key: a run's directory, or for one that is not there what its relatives call it."""

    def __init__(self, runs: dict[Path, _Run], asked: Path) -> None:
        self._runs, self._members, self._parents = runs, {}, {}
        for path, run in runs.items():
            self._members[path] = _member(run, path == asked)
        for path, run in runs.items():
            if run.chain:
                self._parents[path] = self._parent(run)
        for path, run in runs.items():
            self._missing_children(path, run)

    def roots(self) -> list[Member]:
        """Put every member below its parent; those without one are left."""
        for key, parent in self._parents.items():
            self._members[parent].children.append(self._members[key])
        for member in self._members.values():
            member.children.sort(key=lambda child: (child.position, child.run))
        return [member for key, member in self._members.items() if key not in self._parents]

    def _parent(self, run: _Run) -> Any:
        """Key of a run's parent: at the stated place, or moved and known by its record of this branch, or missing."""
        above, stated = run.chain[0], Path(run.lineage.get("parent") or "")
        there = self._runs.get(stated)
        if there is None or there.name != above["run"]:
            there = self._found(above["run"], run.name, above["position"])
        if there is None:
            return self._missing(run.chain)
        self._members[run.directory].pinned = there.knows(run.name, above["position"])
        return there.directory

    def _found(self, name: str, child: str, position: int) -> _Run | None:
        return next((run for run in self._runs.values() if run.name == name and run.knows(child, position)), None)

    def _missing(self, chain: list[dict[str, Any]]) -> Any:
        """Key of a run that is known only as an ancestor: made, with those above it, where nobody made it before."""
        name, above = chain[0]["run"], chain[1:]
        position = above[0]["position"] if above else 0
        there = self._found(above[0]["run"], name, position) if above else None
        parent = there.directory if there else self._missing(above) if above else None
        return self._add_missing(parent, name, position, chain[0].get("path"))

    def _missing_children(self, path: Path, run: _Run) -> None:
        """Branches that left a record and are not there."""
        for fork in run.forks:
            name, position = fork.get("run", "?"), fork.get("position", 0)
            here = (self._runs[key] for key, above in self._parents.items() if above == path and key in self._runs)
            if not any((child.name, child.chain[0]["position"]) == (name, position) for child in here):
                key = self._add_missing(path, name, position, fork.get("out"))
                self._members[key].checkpoint, self._members[key].pinned = fork.get("checkpoint"), True

    def _add_missing(self, parent: Any, name: str, position: int, directory: str | None) -> Any:
        key = (parent, name, position, directory)
        self._members.setdefault(key, Member(name, directory, "missing", position))
        if parent is not None:
            self._parents[key] = parent
        return key


def _gather(here: Path) -> dict[Path, _Run]:
    """The runs at, beside or below a directory, and all that they name."""
    todo = [here, *here.parent.iterdir()] if _is_run(here) else _below(here)
    runs: dict[Path, _Run] = {}
    while todo:
        path = Path(todo.pop()).resolve()
        if path in runs or not _is_run(path):
            continue
        runs[path] = run = _read(path)
        todo += [run.lineage["parent"]] if run.lineage.get("parent") else []
        todo += [fork["out"] for fork in run.forks if fork.get("out")]
    return dict(sorted(runs.items()))


def _below(here: Path) -> list[Path]:
    found = []
    for folder, folders, _ in os.walk(here):
        inside = [Path(folder) / name for name in folders if not name.startswith(".")]
        runs = [path for path in inside if _is_run(path)]
        found += runs
        folders[:] = [path.name for path in inside if path not in runs]
    return found


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() and any((path / name).exists() for name in (LINEAGE, "checkpoints", LOCK))


def _read(path: Path) -> _Run:
    problem, config, lineage = None, {}, {}
    try:
        config = read_yaml(path / CONFIG)
    except OctoError as error:
        problem = error.what
    if (path / LINEAGE).is_file():
        lineage = read_json(path / LINEAGE)
        if not _is_lineage(lineage):
            lineage, problem = {}, f"{path / LINEAGE} cannot be read"
    records = [read_json(file) for file in sorted((path / FORKS).glob("*--*.json"))]
    forks = [record for record in records if _is_place(record) and _is_text(record.get("out"))]
    return _Run(path, str(config.get("name", path.name)), config, lineage, forks, problem)


def _is_lineage(value: Any) -> bool:
    """Whether a damaged or foreign file has the form that is walked here."""
    if not isinstance(value, dict) or not isinstance(value.get("carried") or {}, dict):
        return False
    above = value.get("ancestors") or []
    if not isinstance(above, list) or not all(map(_is_place, above)):
        return False
    return all(map(_is_text, [value.get("parent"), *(one.get("path") for one in above)]))


def _is_place(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("run"), str) and isinstance(value.get("position"), int)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _member(run: _Run, asked: bool) -> Member:
    planned, held = _planned(run), is_held(run.directory)
    tokens = _tokens(run.directory, held)
    ended = planned is not None and tokens >= planned
    lineage = run.lineage
    return Member(
        run.name,
        str(run.directory),
        "training" if held else "finished" if ended else "stopped",
        lineage.get("position", 0),
        tokens,
        planned,
        lineage.get("learning_rate"),
        lineage.get("carried"),
        lineage.get("checkpoint"),
        None,
        run.problem,
        asked,
    )


def _planned(run: _Run) -> int | None:
    try:
        config = parse_config(RunConfig, run.config, CONFIG)
    except OctoError:  # of another version
        return None
    return config.steps * config.tokens_per_step


def _tokens(directory: Path, held: bool) -> int:
    """Tokens of a run: while it trains of its last step, else of its checkpoint, from which it would go on."""
    try:
        if held:
            with (directory / METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_LINE))
                return int(json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["run_tokens"])
        return int(read_facts(latest_checkpoint(directory))["run_tokens"]) if has_checkpoint(directory) else 0
    except (OSError, OctoError, ValueError, KeyError, TypeError):
        return 0


def _holds(root: Member, here: Path) -> bool:
    return root.asked or any(_holds(child, here) for child in root.children)

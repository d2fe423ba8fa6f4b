"""What a campaign directory holds, read as it is: the one place that knows file and field names of the other rooms.

Everything may be missing, half written or damaged. What cannot be read counts as missing and is named in `notes`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_octo.config.campaign import DIRECTORIES
from megatron_octo.page.markup import look


@dataclass(frozen=True)
class Run:
    """One training run: its steps in order and where it came from.

    Attributes:
        rows: objects of metrics.jsonl, one a step, each with a finite `tokens`.
        lineage: content of lineage.json; empty when there is none.
        hashes: file name -> sha256 of the newest sealed checkpoint's seal.
        facts: run.json of that checkpoint; empty when there is none.
    """

    name: str
    rows: list[dict[str, Any]]
    lineage: dict[str, Any]
    hashes: dict[str, str]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Branch:
    """One decay branch and what was made of it; parts that do not exist yet are None or empty.

    Attributes:
        before, after: results of the evaluations before and after RL.
        answers: side ("before", "after") -> greedy responses with their verdicts, all that are saved.
    """

    name: str
    run: Run
    certificate: dict[str, Any] | None
    rl: list[dict[str, Any]]
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    answers: dict[str, list[dict[str, Any]]]
    hashes: dict[str, str]


@dataclass
class Record:
    """Everything the report is made from."""

    name: str
    config: dict[str, Any]
    manifest: dict[str, Any] | None
    machine: dict[str, Any] | None
    states: dict[str, dict[str, Any]]
    stable: Run
    branches: list[Branch]
    hashes: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """The stable run, then the branches."""
        return [self.stable, *(branch.run for branch in self.branches)]

    @property
    def wants_rl(self) -> bool:
        """Whether the campaign asks for RL (a campaign that does not say is taken to)."""
        return "rl" not in self.config or self.config["rl"] is not None


def number(value: Any) -> float | int | None:
    """The value if it is a finite number, else None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def look_number(values: Any, *paths: str) -> float | int | None:
    """The first finite number found under the paths, see `look`."""
    found = (number(look(values, path)) for path in paths)
    return next((value for value in found if value is not None), None)


def read_record(out: Path) -> Record:
    """Read a campaign directory; never fails on what is in it."""
    reader = _Reader(out)
    config = reader.mapping("campaign.yaml", yaml.safe_load) or {}
    return Record(
        name=str(config.get("name") or out.name),
        config=config,
        manifest=reader.mapping("data/manifest.json"),
        machine=reader.mapping("machine.json"),
        states=reader.states(),
        stable=reader.run("stable"),
        branches=[reader.branch(name) for name in reader.branch_names(config)],
        hashes=reader.hashes("campaign.yaml", "data/manifest.json"),
        notes=reader.notes,
    )


class _Reader:
    def __init__(self, out: Path) -> None:
        self.out = out
        self.notes: list[str] = []

    def mapping(self, name: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any] | None:
        path = self.out / name
        if not path.is_file():
            return None
        try:
            values = parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            values = None
        if not isinstance(values, dict):
            self.notes.append(f"{name} is damaged and was not used")
            return None
        return values

    def lines(self, name: str, key: str) -> list[dict[str, Any]]:
        """Objects of a .jsonl file ordered by `key`; of two with the same value the later one counts."""
        path = self.out / name
        if not path.is_file():
            return []
        rows: dict[float, dict[str, Any]] = {}
        damaged = 0
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            row = _parse_object(line)
            at = number(row.get(key))
            if at is None:
                damaged += bool(line.strip())
            else:
                rows[at] = row
        if damaged:
            self.notes.append(f"{name}: {damaged} unreadable {'line' if damaged == 1 else 'lines'} left out")
        return [rows[at] for at in sorted(rows)]

    def states(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in sorted(self.out.glob("state/*.json")):
            state = self.mapping(f"state/{path.name}")
            if state is not None and path.stem != "report":  # the report is being written right now
                found[path.stem] = state
        return found

    def branch_names(self, config: dict[str, Any]) -> list[str]:
        if isinstance(config.get("branches"), dict):
            return [str(name) for name in config["branches"]]
        runs = {path.parent.name for path in self.out.glob("*/metrics.jsonl")}
        return sorted(runs - DIRECTORIES)

    def run(self, name: str) -> Run:
        seals = sorted(self.out.glob(f"{name}/checkpoints/step_*/seal.json"))
        newest = f"{name}/checkpoints/{seals[-1].parent.name}" if seals else ""
        return Run(
            name=name,
            rows=self.lines(f"{name}/metrics.jsonl", "tokens"),
            lineage=self.mapping(f"{name}/lineage.json") or {},
            hashes=self.hashes(f"{newest}/seal.json") if newest else {},
            facts=(self.mapping(f"{newest}/run.json") if newest else None) or {},
        )

    def answers(self, name: str, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Greedy responses of an evaluation: all of them, or those quoted in the result itself."""
        path = self.out / "eval" / f"{name}.responses.jsonl"
        if evaluation is None:
            return []
        if path.is_file():
            rows = [_parse_object(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n")]
        else:
            quoted = evaluation.get("samples")
            rows = [row for row in quoted if isinstance(row, dict)] if isinstance(quoted, list) else []
        return [row for row in rows if row.get("question") and row.get("pass", "greedy") == "greedy"]

    def branch(self, name: str) -> Branch:
        before, after = self.mapping(f"eval/{name}-base.json"), self.mapping(f"eval/{name}-rl.json")
        return Branch(
            name=name,
            run=self.run(name),
            certificate=self.mapping(f"hf/{name}/certificate.json"),
            rl=self.lines(f"rl/{name}/metrics.jsonl", "step"),
            before=before,
            after=after,
            answers={"before": self.answers(f"{name}-base", before), "after": self.answers(f"{name}-rl", after)},
            hashes=self.hashes(f"hf/{name}/certificate.json", f"eval/{name}-base.json", f"eval/{name}-rl.json"),
        )

    def hashes(self, *names: str) -> dict[str, str]:
        present = [name for name in names if (self.out / name).is_file()]
        return {name: hashlib.sha256((self.out / name).read_bytes()).hexdigest() for name in present}


def _parse_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}

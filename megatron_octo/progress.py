"""Progress of long work: a bar with an ETA on a terminal, a small JSON file under a campaign, else silence."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRESS_VARIABLE = "OCTO_PROGRESS"
"""Environment variable that names the file a campaign reads a stage's progress from."""

_SECONDS_BETWEEN_WRITES = 0.5


class Progress:
    """Counts work done; use as a context manager and call `advance`.

    Args:
        label: what is being done, in a word or two.
        total: amount of work in all, in `unit`; None where nobody knows.
        unit: what is counted, e.g. "tokens", "problems".
        done: amount done before this process started (a resumed run).
    """

    def __init__(self, label: str, total: float | None, unit: str = "tokens", done: float = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._before, self._began = done, time.time()  # an estimate counts what this process did, not what it found
        self._file = os.environ.get(PROGRESS_VARIABLE)
        self._bar: Any = None
        self._last_write = 0.0
        self._facts: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if self._file is None and sys.stderr.isatty():
            self._bar = _terminal_bar()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, facts="")
            self._bar.start()
        self._write(force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(force=True)
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: float = 1, **facts: Any) -> None:
        """Add work done and show facts beside it, e.g. `advance(8192, loss=0.71)`."""
        self.done += amount
        self._facts.update(facts)
        if self._bar is not None:
            text = " ".join(f"{name} {_short(value)}" for name, value in self._facts.items())
            self._bar.update(self._task, completed=self.done, facts=text)
        self._write()

    def _write(self, force: bool = False) -> None:
        if self._file is None:
            return
        now = time.time()
        if not force and now - self._last_write < _SECONDS_BETWEEN_WRITES:
            return
        self._last_write = now
        state = {"label": self.label, "done": self.done, "total": self.total, "unit": self.unit}
        state |= {"before": self._before, "began": self._began, "time": now}
        path = Path(self._file)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**state, "facts": self._facts}), encoding="utf-8")
        temporary.replace(path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _terminal_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[facts]}"),
        console=Console(stderr=True), transient=False,
    )  # fmt: skip

"""Progress of long work: a bar with an ETA on a terminal, a small JSON file under a campaign, plain lines in a log."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_octo.units import format_bytes, format_duration, format_flops, format_tokens

PROGRESS_VARIABLE = "OCTO_PROGRESS"
"""Environment variable that names the file a campaign reads a stage's progress from."""

_SECONDS_BETWEEN_WRITES = 0.5
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_SAMPLES = 0.5
_SAMPLES = 240  # of the moving rate: two minutes of quick steps, or as many slow ones

_WORDS = {
    "loss": lambda value: f"loss {value:.4f}",
    "validation": lambda value: f"validation {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.3g}",
    "tokens_per_second": lambda value: f"{format_tokens(round(value))} tok/s",
    "device_flops_per_second": lambda value: f"{format_flops(value)}FLOP/s each",
    "step_so_far": lambda value: f"this step for {format_duration(value)}",
    "mfu": lambda value: f"MFU {value:.1%}",
}


class Progress:
    """Counts work done; use as a context manager and call `advance`.

    Args:
        label: what is being done, in a word or two.
        total: amount of work in all, in `unit`; None where nobody knows.
        unit: what is counted, e.g. "tokens", "problems".
        done: amount done before this process started (a resumed run).
        lines: where stderr is no terminal, print a plain line every half minute, so that a batch job's log tells.
        quiet: seconds before the first of these lines; work that takes less prints none.
    """

    def __init__(
        self, label: str, total: float | None, unit: str = "tokens", done: float = 0, lines: bool = False,
        quiet: float = 0.0,
    ) -> None:  # fmt: skip
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._before, self._began = done, time.time()  # an estimate counts what this process did, not what it found
        self._file = os.environ.get(PROGRESS_VARIABLE)
        self._lines = lines and not sys.stderr.isatty()
        self._bar: Any = None
        self._last_write = 0.0
        self._last_line = time.monotonic() + quiet - _SECONDS_BETWEEN_LINES
        self._spoke, self._last_told = not quiet, done
        self._facts: dict[str, Any] = {}
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)

    def __enter__(self) -> Progress:
        if self._file is None and sys.stderr.isatty():
            self._bar = terminal_bar()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, **self._columns())
            self._bar.start()
        self._write(force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(force=True)
        if self._bar is not None:
            self._bar.stop()
        if self.done != self._last_told and self._spoke:
            self._line(force=True)

    def advance(self, amount: float = 1, **facts: Any) -> None:
        """Add work done and show facts beside it, e.g. `advance(8192, loss=0.71)`."""
        self.done += amount
        self._facts.update(facts)
        if amount < 0:  # a run that went back to a checkpoint
            self._samples.clear()
        if amount:
            self._sample()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, **self._columns())
        self._write()
        if amount:
            self._line()

    def expect(self, total: float) -> None:
        """Take another total, where it can only be guessed while work goes on."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self._write()

    def left(self) -> float | None:
        """Seconds to the end at the rate of the last minutes of this process; None where nobody can know."""
        if self.total is None or not self._samples or self.done <= self._samples[0][1]:
            return None
        began, before = self._samples[0]
        spent = time.monotonic() - began
        return max(0.0, spent * (self.total - self.done) / (self.done - before))

    def _sample(self) -> None:
        now = time.monotonic()  # the first sample is the end of the first piece, which took the warm-up
        if not self._samples or now - self._samples[-1][0] >= _SECONDS_BETWEEN_SAMPLES:
            self._samples.append((now, self.done))

    def _columns(self) -> dict[str, str]:
        left = self.left()
        amount = describe_amount(self.done, self.total, self.unit)
        eta = "" if left is None else f"eta {format_duration(left)}"
        return {"amount": amount, "eta": eta, "facts": " · ".join(describe_facts(self._facts))}

    def _line(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._lines or (not force and now - self._last_line < _SECONDS_BETWEEN_LINES):
            return
        self._last_line, self._last_told, self._spoke = now, self.done, True
        share = [f"{self.done / self.total:.1%}"] if self.total else []
        parts = [*share, *(text for text in self._columns().values() if text)]
        print(f"{time.strftime('%H:%M:%S')} {self.label}: {' · '.join(parts)}", file=sys.stderr, flush=True)

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


def describe_facts(facts: dict[str, Any]) -> list[str]:
    """Facts of `Progress.advance` as people read them: known names in their units, others as they are."""
    return [
        _WORDS.get(name, lambda value, name=name: f"{name} {_short(value)}")(value)
        for name, value in facts.items()
        if value is not None
    ]


def describe_amount(done: float, total: float | None, unit: str) -> str:
    """Work done, and of how much where that is known: '1.05M of 2.56M tokens', '3 of 8 problems', '2 MiB of 1 GiB'."""
    if unit == "bytes":
        return " of ".join(format_bytes(count) for count in (done, total) if count is not None)
    done_text, total_text = (
        None if count is None else format_tokens(int(count)) if unit == "tokens" else f"{count:g}"
        for count in (done, total)
    )
    return f"{done_text} {unit}" if total_text is None else f"{done_text} of {total_text} {unit}"


def terminal_bar(console: Any = None) -> Any:
    """The bar of rich that shows progress on stderr, or on a given console; tasks have `amount`, `eta` and `facts`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True, max_width=24, overflow="ellipsis")),
        BarColumn(bar_width=None, table_column=Column(min_width=8, max_width=40, ratio=1)),
        TextColumn("{task.percentage:3.0f}%", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[amount]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[eta]}", style="cyan", table_column=Column(no_wrap=True)),
        TextColumn("[dim]{task.fields[facts]}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
        console=console or Console(stderr=True), expand=True,
    )  # fmt: skip


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""What a person sees while a campaign runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from megatron_octo.campaign.stages import Stage
from megatron_octo.campaign.state import read_progress, read_state
from megatron_octo.progress import describe_amount, describe_facts
from megatron_octo.units import format_duration

_SECONDS_BETWEEN_LINES = 10.0
_MARKS = {
    "done": "[green]done[/]",
    "running": "[yellow]running[/]",
    "failed": "[red]failed[/]",
    "waiting": "[dim]waiting[/]",
}


class Display:
    """Shows the stages; a context manager around `Engine.run`."""

    def __init__(self, out: Path, stages: list[Stage]) -> None:
        self.out, self.stages, self.began = out, stages, time.time()
        self._live: Any = None
        self._said: dict[str, str] = {}
        self._last_line = 0.0

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(status_table(self.out, self.stages))
            self._live.stop()
        else:
            self._announce()

    def show(self, running: set[str], done: set[str]) -> None:
        """Refresh; cheap enough to be called several times a second."""
        if self._live is not None:
            self._live.update(status_table(self.out, self.stages))
            return
        self._announce()
        if time.time() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.time()
            for name in sorted(running):
                self._say(f"{name}: {_describe(read_progress(self.out, name))}")

    def _announce(self) -> None:
        for stage in self.stages:
            state = read_state(self.out, stage.name)
            if state.status != self._said.get(stage.name, "waiting"):
                self._said[stage.name] = state.status
                took = f" in {format_duration(state.seconds)}" if state.status in ("done", "failed") else ""
                self._say(f"{stage.name}: {state.status}{took}")

    def _say(self, text: str) -> None:
        print(f"[{format_duration(time.time() - self.began):>7}] {text}", file=sys.stderr, flush=True)


def status_table(out: Path, stages: list[Stage]) -> Any:
    """A table of all stages with their state and progress, for rich."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "state", "time", "progress"):
        table.add_column(heading, no_wrap=heading != "progress")
    for stage in stages:
        state = read_state(out, stage.name)
        running = state.status == "running"
        seconds = state.seconds + (time.time() - state.started if running else 0)
        progress = _describe(read_progress(out, stage.name)) if running else ""
        table.add_row(
            stage.name, _MARKS[state.status], format_duration(seconds) if seconds else "", progress or stage.title
        )
    return table


def _describe(progress: dict[str, Any]) -> str:
    if not progress:
        return "starting"
    done, total, unit = progress["done"], progress["total"], progress["unit"]
    parts = [progress["label"], describe_amount(done, total, unit), *describe_facts(progress["facts"])]
    if total:
        parts.insert(1, f"{done / total:4.0%}")
    here, spent = done - progress["before"], progress["time"] - progress["began"]
    if total and done < total and here > 0 and spent > 0:
        parts.append(f"eta {format_duration(spent * (total - done) / here)}")
    return "  ".join(parts)

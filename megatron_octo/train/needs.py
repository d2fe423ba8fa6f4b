"""What a run needs of its data, before anything is started: windows, passes, tokens that fit. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_octo.checkpoint.store import POINTER
from megatron_octo.config.blends import blends_of, shared_out
from megatron_octo.config.run import RunConfig
from megatron_octo.data.mix.mixture import check_tokenizer, check_tokens, open_source, windows_per_epoch
from megatron_octo.data.mix.replace import is_there
from megatron_octo.train.start import METRICS, Start


@dataclass(frozen=True)
class Need:
    """What a run takes from one source of its mixture.

    Args:
        source: its name.
        path: prefix of its pair of files.
        share: of all windows of the run.
        windows: of the data's sequence length, that the whole run reads from it.
        passes: over the source since the order began; above 1 it repeats, in a new order each time. None: its files are
            not there.
        scanned: whether every token was seen to be in the model's vocabulary.
    """

    source: str
    path: Path
    share: float
    windows: int
    passes: float | None = None
    scanned: bool = False


def needs(run: RunConfig, start: Start | None = None, lacking: bool = False) -> list[Need]:
    """Find out what a run reads, and open each source for it.

    Args:
        run: the checked configuration.
        start: where it begins; a branch may read on where its parent was.
        lacking: whether files may be missing (a rehearsal on another machine); damaged ones are refused all the same.

    Returns:
        One `Need` a source, by name.

    Raises:
        DataError: a source is missing, damaged or shorter than a window, or it or the tokenizer holds more tokens than
            the model's vocabulary.
    """
    if run.data.tokenizer.is_dir():  # a new run needs it: train.start
        check_tokenizer(run.data, run.model.vocabulary)
    first, blends = (start.first_window, start.blends) if start else (0, blends_of(run.data))
    last = first + run.steps * run.batch.global_batch
    own, all_read = shared_out(blends, first, last), shared_out(blends, 0, last)
    found = []
    for name, path in run.data.paths.items():
        need = Need(name, path, own[name] / (last - first), round(own[name]))
        if not (lacking and not is_there(path)):
            index = open_source(run.data, name)
            passes = all_read[name] / windows_per_epoch(index.tokens, run.data.sequence_length)
            scanned = check_tokens(path, f"data.mixture.{name}", run.model.vocabulary)
            need = replace(need, passes=passes, scanned=scanned)
        found.append(need)
    return found


def repeats(passes: dict[str, float | None]) -> str:
    """Say which sources are read more than once and how often; empty if none is."""
    often = [f"{name} {count:.3g} times" for name, count in passes.items() if (count or 0) > 1]
    return f"sources read more than once: {', '.join(often)}" if often else ""


def remarks(run: RunConfig, start: Start | None, found: list[Need]) -> list[str]:
    """What a user should hear before a run starts, a line each: nothing that is wrong, but maybe not what was meant."""
    lines = []
    if start and start.step and not (run.out / POINTER).exists():
        newest = start.checkpoint.name if start.checkpoint else ""
        lines.append(f"{run.out / POINTER} is missing; going on from {newest}, the newest sealed checkpoint")
    if start and start.step and not (run.out / METRICS).exists():
        lines.append(f"{run.out / METRICS} is missing; its lines to step {start.step} are gone, later ones follow")
    if run.tokens_per_step > run.schedule.tokens:
        lines.append(
            f"a step of {run.batch.global_batch} x {run.data.sequence_length} = {run.tokens_per_step} tokens is longer "
            f"than schedule.tokens = {run.schedule.tokens}: the run is that one step"
        )
    if often := repeats({need.source: need.passes for need in found}):
        lines.append(often)
    return lines

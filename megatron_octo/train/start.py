"""Where a run starts: from nothing, from given weights, as a branch, or where it stopped. Needs no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_octo.checkpoint.seal import seal_digest
from megatron_octo.checkpoint.store import (
    CHECKPOINTS,
    FACTS,
    check_unsealed,
    checkpoint_at,
    has_checkpoint,
    latest_checkpoint,
    naming_older,
    read_facts,
    remove_leftovers,
    sealed_facts,
)
from megatron_octo.config.blends import Blend, blends_of
from megatron_octo.config.load import differences, dump_config, load_config, parse_config
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.data.mix.held_out import open_held_out
from megatron_octo.data.mix.made_with import check_one_tokenizer
from megatron_octo.data.mix.replace import decide
from megatron_octo.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from megatron_octo.files import hold, is_held, make_directory, read_json, write_json, write_text
from megatron_octo.schedule.fork import LINEAGE, Origin, lineage_record, record_fork, with_parents_rate
from megatron_octo.train.change import continued, refuse_renamed, stored_run, with_moved_data
from megatron_octo.train.loggers import check_loggers

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
STATISTICS = "statistics.jsonl"
SENTINEL = "sentinel.jsonl"
PROFILE = "profile"
CONFIG = "config.yaml"
CACHE = "data-cache"
REWINDS = "rewinds.json"
"""Which batches are passed over, and why: the file, and the name of the same list in a checkpoint's memory."""
_LOCK_PATIENCE = 3.0  # seconds: a killed predecessor needs a moment to die


class Start(NamedTuple):
    """How a run begins.

    Args:
        run: the configuration, with the learning rate that a branch takes from its parent.
        checkpoint: what to load; None for random initial weights.
        moments: whether the optimizer's state is loaded too.
        step: steps this run has already taken.
        root_tokens: tokens of the lineage before this run.
        lineage: the record of a branch.
        memory: what hooks remembered; empty for a new run, a branch among them.
        data: what tells the sources whose order is read on; empty for an order that begins.
    """

    run: RunConfig
    checkpoint: Path | None
    moments: bool
    step: int = 0
    root_tokens: int = 0
    lineage: dict[str, Any] | None = None
    memory: dict[str, Any] = {}
    data: dict[str, Any] = {}

    @property
    def first_window(self) -> int:
        """Window of the data order that the run's first step begins with; not 0 if a branch reads on."""
        return (self.lineage or {}).get("first_window", 0)

    @property
    def blends(self) -> list[Blend]:
        """Every mixture of the data order, those before the run's first step among them."""
        return blends_of(self.run.data, self.first_window, (self.lineage or {}).get("history", ()))


def plan_start(run: RunConfig) -> Start:
    """Decide where a run starts, changing nothing.

    Raises:
        ConfigError: the run exists and differs in a field that may not change, or a branch does not continue
            its parent.
        CheckpointError: a pointer, parent or checkpoint is not there, or checkpoints are without a seal.
        DataError: a new run's tokenizer is not there, a source of the validation is missing or unfit, or one that is
            read was built with another tokenizer.
        EnvironmentProblem: the run directory is a file, or a logger's package is not installed.
    """
    check_place(run.out)
    check_loggers(run)
    check_made_with(run)
    if run.validation is not None:
        open_held_out(run)
    if has_checkpoint(run.out):
        return _resume(run)
    check_tokenizer_directory(run)
    return origin(run)


def check_place(run_dir: Path) -> None:
    """Check that a run directory can be one: not a file, and without checkpoints that lost their seals.

    Raises:
        EnvironmentProblem: it is a file.
        CheckpointError: it holds checkpoints, and none is sealed.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise EnvironmentProblem(f"{run_dir}: a file stands where a directory is needed", fix="name another `out`")
    check_unsealed(run_dir)


def make_place(run_dir: Path) -> None:
    """Make a run directory.

    Raises:
        EnvironmentProblem: it cannot be made.
    """
    try:
        make_directory(run_dir)
    except OSError as error:
        raise EnvironmentProblem(
            f"{run_dir}: cannot be made ({error.strerror})", "a run keeps its checkpoints there", "name another `out`"
        ) from None


def check_made_with(run: RunConfig) -> None:
    """Check that what a run trains and validates on was built with its tokenizer, as far as manifests say.

    Raises:
        DataError: a source was built with another one.
    """
    pairs = {f"data.mixture.{name}": path for name, path in run.data.paths.items()}
    held_out = run.validation.sources if run.validation else {}
    check_one_tokenizer(run.data.tokenizer, pairs | {f"validation.sources.{name}": at for name, at in held_out.items()})


def check_tokenizer_directory(run: RunConfig) -> None:
    """Check that a new run's tokenizer is where it says.

    Raises:
        DataError: it is not.
    """
    named = run.data.tokenizer
    if not named.is_dir():
        raise DataError(
            f"data.tokenizer = {named}: {'a file, not a directory' if named.exists() else 'no such directory'}",
            "the trained model is exported with the tokenizer of its data",
            "name the one that `octo data build` wrote or used"
            + ("" if named.is_absolute() else f"; a relative path starts from here, {Path.cwd()}"),
        )


def origin(run: RunConfig) -> Start:
    """Where a run begins that has not trained yet; which of its sources are missing is decided here, once for all.

    Raises:
        ConfigError: a branch does not continue its parent, or a checkpoint holds another model.
        CheckpointError: a parent or checkpoint is not there.
    """
    run = run.model_copy(update={"data": decide(run.data)})
    if run.start.fork is not None:
        return _fork(run)
    if run.start.checkpoint is not None:
        return Start(run, _given(run), moments=False)
    return Start(run, None, moments=False)


def last_step(run: RunConfig, until: int | None) -> int:
    """The step a leg of the run ends with: all of it, or the first that reaches `until` tokens."""
    return run.steps if until is None else min(run.steps, -(-until // run.tokens_per_step))


def open_run(run: RunConfig) -> Start:
    """Make a run directory ready to train in; only rank 0, holding the lock, may call this.

    Removes what a killed save left, writes `config.yaml` and a branch's `lineage.json`, tells a parent of its new
    branch, and cuts lines of `metrics.jsonl` and its companions that lie beyond the checkpoint. A rewind that was cut
    off is completed: its list is in a file.

    Raises:
        ConfigError: see `plan_start`.
        CheckpointError: see `plan_start`.
    """
    start = plan_start(run)
    remove_leftovers(run.out)
    if not _states(run.out / CONFIG, start.run):
        dump_config(start.run, run.out / CONFIG)
    if start.lineage is not None:
        write_json(run.out / LINEAGE, start.lineage)
        if start.step == 0:
            _tell_parent(run, start.lineage)
    cut_records(run.out, start.step)
    if start.step == 0:
        (run.out / REWINDS).unlink(missing_ok=True)
    rewinds = known_rewinds(run.out, start.memory)
    return start._replace(memory=start.memory | ({REWINDS: rewinds} if rewinds else {}))


def _states(path: Path, run: RunConfig) -> bool:
    """Whether a file says what a run is: one that a user wrote in its place keeps its comments."""
    try:
        return load_config(RunConfig, path) == run
    except ConfigError:
        return False


def known_rewinds(run_dir: Path, memory: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rewind of a run, oldest first: those a checkpoint remembers, and those since.

    Raises:
        CheckpointError: the file is damaged; what it lists must not be read again unnoticed.
    """
    path, remembered = run_dir / REWINDS, memory.get(REWINDS, [])
    if not path.exists():
        return remembered
    found = read_json(path)
    if not isinstance(found, list):
        raise CheckpointError(
            f"{path}: is damaged",
            "it lists the steps whose batches are passed over since a rewind",
            f"restore it; or remove it, and only the {len(remembered)} rewinds that the checkpoint remembers count",
        )
    return max(found, remembered, key=len)


def only_trainer(run_dir: Path) -> IO[str]:
    """Claim a run directory while the returned context is open.

    Raises:
        EnvironmentProblem: another process holds it, or the directory cannot be written.
    """
    try:
        return hold(run_dir, _LOCK_PATIENCE)
    except BlockingIOError as error:
        raise EnvironmentProblem(
            f"{run_dir}: another process trains here (process {error.strerror})",
            "two processes on one run directory would destroy each other's checkpoints",
            "wait for it, stop it, or choose another `out`",
        ) from None
    except OSError as error:
        raise EnvironmentProblem(f"{run_dir}: cannot be written ({error.strerror})", fix="check `out`") from None


def cut_records(out: Path, step: int) -> None:
    """Cut every file of a run directory that has a line for a step; see `cut_metrics`."""
    for name in (METRICS, VALIDATION, STATISTICS, SENTINEL):
        cut_metrics(out / name, step)


def cut_metrics(path: Path, step: int) -> None:
    """Keep the metric lines of steps 1 to `step`; later ones, and a line cut off by a kill, are dropped."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and 0 < _step_of(line) <= step]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))


def _resume(run: RunConfig) -> Start:
    checkpoint = latest_checkpoint(run.out)
    with naming_older(checkpoint):
        facts = sealed_facts(checkpoint)
    return Start(
        continued(run, facts, checkpoint),
        checkpoint,
        True,
        facts["step"],
        facts["tokens"] - facts["run_tokens"],
        facts.get("lineage"),
        facts.get("memory", {}),
        facts.get("data", {}),
    )


def _fork(run: RunConfig) -> Start:
    fork = run.start.fork
    assert fork is not None
    checkpoint = checkpoint_at(fork.parent, fork.at)
    facts = sealed_facts(checkpoint)
    if fork.at is None and is_held(fork.parent):
        raise CheckpointError(
            f"{fork.parent}: still trains, and its latest checkpoint changes",
            "a branch of a parent that trains says where it leaves",
            f"set start.fork.at, e.g. to {facts['tokens']}, or wait for the parent",
        )
    parent = with_moved_data(stored_run(facts, checkpoint), run, facts)
    origin = Origin(str(fork.parent.resolve()), checkpoint.name, seal_digest(checkpoint), facts, parent)
    run = with_parents_rate(run, origin)
    lineage = lineage_record(run, origin)
    if fork.data == "continue":
        refuse_renamed(run, parent, facts, [Blend(**blend) for blend in lineage["history"]])
    data = facts.get("data", {}) if fork.data == "continue" else {}
    return Start(run, checkpoint, fork.moments, 0, facts["tokens"], lineage, data=data)


def _tell_parent(run: RunConfig, lineage: dict[str, Any]) -> None:
    """Pin the checkpoint a branch leaves from, then see that it was not pruned just before."""
    if not record_fork(run, lineage):
        print(
            f"octo: note: {lineage['parent']} cannot be written, so it does not know of branch '{run.name}', and "
            f"may prune {lineage['checkpoint']}, which the branch left from",
            file=sys.stderr,
        )
    read_facts(Path(lineage["parent"]) / CHECKPOINTS / lineage["checkpoint"])


def _given(run: RunConfig) -> Path:
    """The checkpoint a run starts from, named itself or by its run directory; it must hold this run's model.

    Tensors alone do not tell: another RoPE or norm epsilon has the same shapes, and would train without an error.
    """
    named = run.start.checkpoint
    assert named is not None
    if (named / FACTS).is_file():
        checkpoint = named
    elif has_checkpoint(named):
        checkpoint = latest_checkpoint(named)
    else:
        raise CheckpointError(f"{named}: no checkpoint here", "start.checkpoint names a sealed one", "check the path")
    facts = sealed_facts(checkpoint)
    stored = facts.get("model") or facts.get("config", {}).get("model")
    theirs = parse_config(ModelConfig, stored, f"{checkpoint / FACTS}: model") if stored else run.model
    changed = differences(_of_weights(theirs), _of_weights(run.model), "model")
    if changed:
        raise ConfigError(
            f"{checkpoint} holds another model than this run's: {'; '.join(changed)}",
            "weights mean something only in the model they were trained in",
            "copy the model section that its run.json shows",
        )
    return checkpoint


def _of_weights(model: ModelConfig) -> dict[str, Any]:
    """The settings that give weights their meaning; how they were drawn, and the longest text, are none."""
    return model.model_dump(mode="json", exclude={"init_std", "max_positions"})


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1

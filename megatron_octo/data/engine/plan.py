"""A build as stages: what each task follows from, so that only what changed is made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.clean.questions import benchmark_file
from megatron_octo.data.clean.stages import REMOVALS, clean_stages
from megatron_octo.data.corpora.files import input_path
from megatron_octo.data.corpora.shard import Shard, list_shards, numbered, refuse_shared_files
from megatron_octo.data.engine.code import TOKENISES, code_of
from megatron_octo.data.engine.inputs import (
    InputFile,
    Version,
    inputs_stage,
    lines_of,
    look_at,
    look_at_shards,
    refuse_change,
    tell_empty,
    tell_remote,
    versions,
)
from megatron_octo.data.engine.located import located, on_same_files
from megatron_octo.data.engine.publish import known_revisions
from megatron_octo.data.engine.stage import Stage, calls_of, plain
from megatron_octo.data.engine.tasks import (
    TOKENISE,
    Build,
    Corpus,
    Cut,
    Piece,
    Tokenizer,
    Watched,
    beyond_budgets,
    drop_pieces,
    join,
    make_tokenizer,
    tokenise,
    watch,
)
from megatron_octo.data.engine.tokenizer import given_tokenizer, tell_lossy
from megatron_octo.data.index.digest import tokenizer_files
from megatron_octo.data.index.encode import load_encoder
from megatron_octo.files import hash_json, write_json

FORMAT = 4
TOKENIZER, JOIN, BEYOND = "tokenizer", "join", "beyond"


class Plan:
    """What a build reads, and its stages.

    Args:
        config: what is built.
        out: data directory, absolute.
        saved: what `save` wrote, instead of a look at the inputs.

    Raises:
        DataError: an input is missing.
        ConfigError: a path names an environment variable that is not set.
    """

    def __init__(self, config: DataBuildConfig, out: Path, saved: dict[str, Any] | None = None) -> None:
        self.shards: dict[str, list[Shard]]
        self.files: dict[str, dict[str, InputFile]]
        self.revisions: dict[str, str] = {}
        if saved is not None:
            self.shards = {name: [_shard(one) for one in own] for name, own in saved["shards"].items()}
            self.files = {
                where: {name: InputFile(**file) for name, file in own.items()} for where, own in saved["files"].items()
            }
        else:
            self.revisions = known_revisions(out)
            self.shards = {name: list_shards(config, name, self.revisions) for name in config.sources}
            refuse_shared_files(config, self.shards)
            self.files = self._files(config)
        paths = {where: file.path for where in config.problem_files for file in self.files[where].values()}
        self.build = Build(located(config, paths), out)

    def tell_inputs(self) -> None:
        """Say what becomes of inputs that are not here, which are empty, and what a given tokenizer loses."""
        config = self.build.config
        times = 2 + (config.tokenizer.train is not None)
        times += 1 + (config.deduplicate is not None) if config.deduplicate or config.decontaminate else 0
        files = {where: own.values() for where, own in self.files.items()}
        tell_remote(files, times)
        tell_empty(files)
        tell_lossy(config)

    def save(self, path: Path) -> None:
        """Write what the inputs look like, for processes that shall not all look for themselves."""
        write_json(path, {"shards": plain(self.shards), "files": plain(self.files)})

    def _files(self, config: DataBuildConfig) -> dict[str, dict[str, InputFile]]:
        """Every input file as it is now, by the field that names it and by its name there."""
        found = {}
        for name in config.corpora:
            looked = look_at_shards(self.shards[name])
            found[f"corpora.{name}"] = {shard.name: looked[shard.path] for shard in self.shards[name]}
        for where, file in config.problem_files.items():
            path = input_path(file, where).absolute()
            found[where] = {path.name: look_at(str(path))}
        for name, benchmark in (config.decontaminate.against if config.decontaminate else {}).items():
            path = benchmark_file(name, benchmark)
            found[f"decontaminate.against.{name}"] = {path.name: look_at(str(path))} if path else {}
        if (directory := given_tokenizer(config.tokenizer)) is not None:
            load_encoder(directory, config.index)
            found["tokenizer.path"] = {path.name: look_at(str(path)) for path in tokenizer_files(directory)}
        return found

    def inputs(self) -> Stage:
        """The first stage: what the input files hash to."""
        return inputs_stage(file for files in self.files.values() for file in files.values())

    def refuse_changes(self) -> None:
        """Check that no input file was written to since the plan was made.

        Raises:
            DataError: one was.
        """
        for files in self.files.values():
            for file in files.values():
                refuse_change(file)

    def inputs_by_field(self, hashes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Every input with size and hash, by the field that names it and the file's name there: for the manifest."""
        return {
            where: {name: {"bytes": file.bytes, "sha256": hashes[file.path]} for name, file in files.items()}
            for where, files in self.files.items()
        }

    def sizes_by_field(self) -> dict[str, dict[str, int]]:
        """The bytes of every input: what can be told of it without reading it."""
        return {where: {name: file.bytes for name, file in files.items()} for where, files in self.files.items()}

    def know(self, facts: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Take what the first stage found; returns the hashes of the input files, by path."""
        stage = self.inputs()
        lines = lines_of(stage, facts)
        self.shards = {name: numbered(own, lines) for name, own in self.shards.items()}
        return {file.path: found["sha256"] for file, found in zip(stage.tasks, facts, strict=True)}

    def stages(self, hashes: Mapping[str, str], intact: frozenset[str] = frozenset()) -> list[Stage]:
        """All stages after the first.

        Args:
            hashes: of the input files, see `know`; the names and sizes of the stages do not depend on them.
            intact: sources of a finished build that need not be made again.
        """
        found = versions((file for files in self.files.values() for file in files.values()), hashes)
        base, cleaning = self._base(found), self._cleaning(found)
        tokenizer = self._tokenizer(found, base)
        removals = self._removals(cleaning)
        pieces = self._pieces(found, {**base, "tokenizer": hash_json(tokenizer.made_from)}, removals)
        join = self._join(pieces, intact)
        pieces = replace(pieces, skip=self._joined(pieces, join))
        same = tuple((file.path, hashes[file.path]) for file in self._small() if file.path in hashes)
        made = [*cleaning, tokenizer, pieces, join, *self._beyond(join, removals)]
        return [replace(stage, work=partial(on_same_files, same, stage.work)) for stage in made]

    def _small(self) -> list[InputFile]:
        """Files that tasks read besides their shards, and that have no check of their own."""
        fields = ("problems.heldout.file", "tokenizer.path")
        return [file for field in fields for file in self.files.get(field, {}).values()]

    def _tokenizer(self, found: dict[str, Version], base: dict[str, Any]) -> Stage:
        trained, given = self.build.config.tokenizer.train, self.files.get("tokenizer.path", {}).values()
        corpora = (trained.corpora or self.build.config.sources) if trained else []
        read = ["tokenizer.path", *(f"corpora.{name}" for name in corpora)]
        task = Tokenizer(tuple(file.path for file in given), tuple(tuple(self.shards[name]) for name in corpora))
        return Stage(TOKENIZER, [task], self._work(make_tokenizer), {**base, "inputs": self._versions(found, read)})

    def _beyond(self, join: Stage, removals: dict[Shard, str]) -> list[Stage]:
        """The stage that tells what a token budget makes of deduplication; none where one of the two is missing."""
        budgets = [self.build.config.budgets[name] for name in self.build.config.corpora]
        if self.build.config.deduplicate is None or not any(budgets):
            return []
        joined = [call.key for call in calls_of(join, self.build.work)]
        tasks = [Cut(shard, key) for shard, key in removals.items()]
        return [Stage(BEYOND, tasks, self._work(beyond_budgets), {"format": FORMAT, "joined": joined})]

    def _cleaning(self, found: dict[str, Version]) -> list[Stage]:
        """The stages that find what to leave out; a file must be the same in all of them."""
        stages = []
        for stage in clean_stages(self.build.config, self.shards, self.build.work, found):
            files = [self._file(task.shard) if hasattr(task, "shard") else None for task in stage.tasks]
            tasks = [Watched(task, file) for task, file in zip(stage.tasks, files, strict=True)]
            stages.append(replace(stage, tasks=tasks, work=partial(watch, stage.work)))
        return stages

    def _file(self, shard: Shard) -> InputFile | None:
        return self.files[f"corpora.{shard.corpus}"][shard.name] if shard.path else None

    def _removals(self, cleaning: list[Stage]) -> dict[Shard, tuple[int, str]]:
        """Numbers and keys of the tasks that say what to leave out, by shard."""
        calls = [call for stage in cleaning if stage.name == REMOVALS for call in calls_of(stage, self.build.work)]
        return {call.task.task.shard: (call.number, call.key) for call in calls}

    def _joined(self, pieces: Stage, join: Stage) -> frozenset[int]:
        """Numbers of pieces that are not needed any more, for their corpus is there."""
        work = self.build.work
        calls = calls_of(join, work)
        done = {call.task.name for call in calls if call.number in join.skip or call.done(work) is not None}
        return frozenset(number for number, task in enumerate(pieces.tasks) if task.shard.corpus in done)

    def _base(self, found: dict[str, Version]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "code": code_of(TOKENISES),
            "settings": hash_json(self.build.config.model_dump(mode="json")),
            "heldout": self._versions(found, ["problems.heldout.file"]),
        }

    def _versions(self, found: dict[str, Version], fields: list[str]) -> list[Version | None]:
        return [found.get(file.path) for field in fields for file in self.files.get(field, {}).values()]

    def _work(self, function: Callable[[Build, Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        return partial(function, self.build)

    def _pieces(
        self, found: dict[str, Version], made_from: dict[str, Any], removals: dict[Shard, tuple[int, str]]
    ) -> Stage:
        tasks: list[Piece] = []
        for name, shards in self.shards.items():
            limited = self.build.config.budgets[name] is not None
            whole = [made_from, self._versions(found, [f"corpora.{name}"]), [removals.get(shard) for shard in shards]]
            after = hash_json(whole) if limited else None
            first = len(tasks)
            tasks += [self._piece(shard, found, first, after, removals.get(shard)) for shard in shards]
        parts = Counter(task.shard.path for task in tasks)
        amounts = [self._amount(task) / (parts[task.shard.path] if task.file else 1) for task in tasks]
        return Stage(TOKENISE, tasks, self._work(tokenise), made_from, amounts, "tokens")

    def _piece(
        self,
        shard: Shard,
        found: dict[str, Version],
        first: int,
        after: str | None,
        removals: tuple[int, str] | None,
    ) -> Piece:
        return Piece(shard, self._file(shard), found.get(shard.path), first, after, removals)

    def _amount(self, task: Piece) -> float:
        """Bytes of the file, or tokens to generate."""
        return task.file.bytes if task.file else self.build.config.budgets[task.shard.corpus] or 1

    def _join(self, pieces: Stage, intact: frozenset[str]) -> Stage:
        keys = [call.key for call in calls_of(pieces, self.build.work)]
        tasks, first = [], 0
        for name, shards in self.shards.items():
            end = first + len(shards)
            removals = tuple(task.removals for task in pieces.tasks[first:end])
            tasks.append(Corpus(name, (first, end), hash_json(keys[first:end]), removals))
            first = end
        skip = frozenset(number for number, task in enumerate(tasks) if task.name in intact)
        sweep = partial(drop_pieces, self.build)
        return Stage(JOIN, tasks, self._work(join), {"format": FORMAT}, sweep=sweep, skip=skip)


def _shard(values: dict[str, Any]) -> Shard:
    part = values["part"]
    return Shard(**{**values, "part": part and tuple(part)})

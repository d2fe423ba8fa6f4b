"""What a data build is: tokenizer, generated and real sources, problems. One file, one data directory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Seed, Strict
from megatron_octo.config.clean import Decontaminate, Deduplicate
from megatron_octo.config.index import IndexConfig
from megatron_octo.errors import ConfigError
from megatron_octo.units import Tokens

WorldKind = Literal["web", "short_cot", "long_cot", "instruction"]
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]*$"


def variables_of(text: str) -> list[str]:
    """Names of the environment variables a path mentions."""
    return [match[1] for match in _VARIABLE.finditer(text)]


def expand(text: str, field: str) -> str:
    """Put environment variables into a path or URL: `${NAME}`, or `${NAME:-default}` where it may be unset or empty.

    Args:
        text: as written in a configuration file.
        field: where it is written, for the message.

    Raises:
        ConfigError: a variable without default is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise ConfigError(
                f"{field} = {text!r}: environment variable {match[1]} is not set",
                "the path cannot be completed without it",
                f"export {match[1]}=..., or write ${{{match[1]}:-default}}",
            )
        return found

    return _VARIABLE.sub(value, text)


def expand_path(text: str, field: str) -> Path:
    """The same for a path of this machine; relative ones start from the working directory."""
    return Path(expand(text, field)).expanduser()


class TrainTokenizer(Strict):
    """A byte-level BPE tokenizer trained on the beginning of the build's own sources."""

    vocabulary_size: int = Field(gt=0)
    corpora: list[str] | None = Field(default=None, min_length=1, description="sources to train on; all by default")
    documents: int = Field(default=4000, gt=0, description="documents read of each source, from its start")


class TokenizerConfig(Strict):
    """Either a tokenizer to train or one to take over."""

    train: TrainTokenizer | None = None
    path: str | None = Field(
        default=None,
        description="directory of tokenizer.json or tokenizer.model, this file, or a SentencePiece file *.model",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerConfig:
        if (self.train is None) == (self.path is None):
            raise ValueError("name exactly one of train and path")
        return self


class WorldSource(Strict):
    """Generated text: tokens of each kind, and values of the world's own settings that differ from its defaults."""

    tokens: dict[WorldKind, Tokens] = Field(default={}, description="token budget of each kind")
    settings: dict[str, int | float] = {}


class InputFile(Strict):
    """A file that the build reads and does not make."""

    path: str = Field(description="may hold ${NAME} and ${NAME:-default}")
    hint: str = Field(default="", description="what to download and from where, shown when the file is missing")
    split: Literal["train", "test"] = Field(default="train", description="which side of its benchmark the file is")
    question_field: str = "question"
    answer_field: str = "answer"


class Corpus(Strict):
    """Real documents: which corpus they are of, and the files that hold it."""

    adapter: str = Field(default="text", description="what its records are: a name that `octo data corpora` lists")
    path: str | None = Field(
        default=None,
        min_length=1,
        description="file, folder, glob or URL of jsonl(.gz, .zst) or parquet; may hold ${NAME} and ${NAME:-default}; "
        "of a folder that is a copy of the corpus's repository the adapter's own files are read; "
        "by default the place where the corpus is published, which needs the network",
    )
    fields: dict[str, str] = Field(default={}, description="names in these files, by the adapter's names")
    rendering: Literal["published", "qa", "prose"] = Field(
        default="published",
        description="form of questions with solutions: the adapter's, as they stand in prompts, or running prose",
    )
    tokens: Literal["all"] | Tokens = "all"
    hint: str = Field(default="", description="what to download and from where, shown when the files are missing")
    split: Literal["train", "test"] = Field(default="train", description="which side of its benchmark the files are")

    @model_validator(mode="after")
    def _not_a_test_split(self) -> Corpus:
        if self.split == "test":
            raise ValueError("a test split is for evaluation: name it under problems.heldout, never as a corpus")
        return self


class ProblemSet(Strict):
    """Problems with known answers: from a file, or from the world where no file is named."""

    count: Literal["all"] | int = Field(default="all", description="how many; a seeded sample where the file has more")
    file: InputFile | None = None

    @model_validator(mode="after")
    def _countable(self) -> ProblemSet:
        if self.count != "all" and self.count < 1:
            raise ValueError(f"count is {self.count}; it must be 1 or more, or 'all'")
        if self.count == "all" and self.file is None:
            raise ValueError("the world has no natural number of problems: give a count")
        return self


class Problems(Strict):
    """`train` is for reinforcement learning, `heldout` for evaluation; a held-out question is never trained on."""

    train: ProblemSet | None = None
    heldout: ProblemSet | None = None

    @model_validator(mode="after")
    def _not_on_a_test_split(self) -> Problems:
        if self.train and self.train.file and self.train.file.split == "test":
            raise ValueError("problems.train names a test split; reinforcement learning would train on it")
        return self


class Inputs(Strict):
    """What documents follow from: what is read, and what is left out while it is read."""

    seed: Seed = 0
    world: WorldSource = WorldSource()
    corpora: dict[str, Corpus] = {}
    problems: Problems = Problems()
    on_bad_line: Literal["strict", "skip"] = Field(
        default="strict", description="a broken input line ends the work, or is left out and counted in the manifest"
    )

    @property
    def problem_files(self) -> dict[str, InputFile]:
        """Every file of problems, by the field that names it."""
        files: dict[str, InputFile] = {}
        for split in ("train", "heldout"):
            problems: ProblemSet | None = getattr(self.problems, split)
            if problems and problems.file:
                files[f"problems.{split}.file"] = problems.file
        return files

    @model_validator(mode="after")
    def _are_names(self) -> Inputs:
        for name in self.corpora:
            if not re.match(_NAME, name):
                raise ValueError(f"corpora.{name}: a name is a file name of letters, digits, '_' and '-'")
            if name in self.world.tokens:
                raise ValueError(f"corpora.{name}: the world already writes a source of this name")
        return self


class DataBuildConfig(Inputs):
    """Everything one data directory follows from."""

    tokenizer: TokenizerConfig
    index: IndexConfig = IndexConfig()
    deduplicate: Deduplicate | None = Field(default=None, description="within and across corpora")
    decontaminate: Decontaminate | None = Field(default=None, description="against benchmarks")

    @property
    def sources(self) -> list[str]:
        """Names of all sources: kinds of the world, then corpora."""
        return [*self.world.tokens, *self.corpora]

    @model_validator(mode="after")
    def _names_fit(self) -> DataBuildConfig:
        if not self.sources:
            raise ValueError("no sources: give world.tokens or corpora")
        wanted = (self.tokenizer.train and self.tokenizer.train.corpora) or []
        unknown = [name for name in wanted if name not in self.sources]
        if unknown:
            raise ValueError(f"tokenizer.train.corpora names {unknown[0]!r}; sources are {', '.join(self.sources)}")
        empty = [name for name, tokens in self.budgets.items() if tokens == 0]
        if empty:
            raise ValueError(f"the token budget of {empty[0]} is 0: leave the source out")
        return self

    @property
    def budgets(self) -> dict[str, int | None]:
        """Tokens asked of each source; None means all there are."""
        limits = {name: None if corpus.tokens == "all" else corpus.tokens for name, corpus in self.corpora.items()}
        return {**self.world.tokens, **limits}

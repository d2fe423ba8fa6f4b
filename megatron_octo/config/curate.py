"""What a curation is: a sample, a judge, a classifier, a refinement. One file, one curated corpus."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from megatron_octo.config.base import Strict
from megatron_octo.config.data import Inputs

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class Endpoint(Strict):
    """A server that speaks OpenAI's chat completions, such as vLLM's, and how hard it may be pressed.

    Nothing here changes an answer but the model.
    """

    url: str = Field(description="base URL, such as http://localhost:8000/v1")
    model: str = Field(min_length=1, description="name the server knows it by")
    key_variable: str | None = Field(
        default=None, min_length=1, description="environment variable that holds the key; none: no key is sent"
    )
    concurrency: int = Field(default=64, gt=0, le=4096, description="requests under way at the same time")
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = Field(default=None, description="of prompts and answers together")
    timeout_seconds: Positive = Field(default=600, description="for one request, from connecting to its last byte")
    attempts: int = Field(default=6, gt=0, description="for one document, before it counts as unanswered")
    first_wait_seconds: Positive = Field(
        default=1, description="after the first failure; doubles with each further one"
    )
    longest_wait_seconds: Positive = 60
    failures: int = Field(default=20, gt=0, description="in a row, by any requests, after which all of them pause")
    pause_seconds: Positive = Field(default=30, description="of such a pause; then a single request tries")
    trials: int = Field(default=10, gt=0, description="of a single request that may fail before the run ends")
    patience_seconds: Positive = Field(default=3600, description="without any answer before the run ends")

    @model_validator(mode="after")
    def _is_a_base_url(self) -> Endpoint:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url is no http(s)://host[:port]/path")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(
                "url holds more than host and path; a key belongs into the variable that key_variable names"
            )
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            raise ValueError("key_variable is no name of an environment variable; a key must not stand in a file")
        if self.attempts >= self.failures:
            raise ValueError("attempts must be fewer than failures: one document is not a server that is down")
        return self


class Question(Strict):
    """What is asked of a model about each document."""

    prompt: str = Field(description="text file with {text} where the document goes; packaged ones are recipes/prompts/")
    endpoint: Endpoint | None = Field(default=None, description="by default the file's own")
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int = Field(gt=0, description="of an answer")
    input_characters: int = Field(default=32_000, gt=0, description="a longer document is cut there, and counted")
    extra: dict[str, Any] = Field(default={}, description="further fields of the request, sent as they are")

    @model_validator(mode="after")
    def _sends_nothing_twice(self) -> Question:
        own = {"model", "messages", "temperature", "top_p", "max_tokens", "stream", "n"} & self.extra.keys()
        if own:
            raise ValueError(f"extra holds {sorted(own)[0]!r}, which has a field of its own or is not supported")
        return self


class Sample(Strict):
    """The documents a judge sees, drawn uniformly within each year."""

    documents_per_year: int = Field(gt=0, description="or all of a year that has fewer")
    year_field: str | None = Field(
        default=None, description="field of the records in which a year is found; none: all documents are one year"
    )
    year_in_file_names: bool = Field(
        default=False, description="it is found in a file's name, such as CC-MAIN-2017-13/"
    )

    @model_validator(mode="after")
    def _looks_in_one_place(self) -> Sample:
        if self.year_in_file_names and self.year_field is not None:
            raise ValueError("a year is found in year_field or in the names of files, not in both")
        return self


class Judge(Question):
    """Scores from 0 to 5. Greedy, for sampling parameters are not published."""

    prompt: str = "recipes/prompts/judge_math.txt"
    max_tokens: int = Field(default=400, gt=0)
    positive_from: int = Field(default=3, ge=1, le=5, description="this score and higher ones are positive")


class Train(Strict):
    """A fastText classifier of what the judge found; its hyperparameters are not published, these are our choice."""

    dimension: int = Field(default=256, gt=0, le=1024)
    word_ngrams: int = Field(default=3, gt=0, le=5)
    buckets: int = Field(
        default=200_000, gt=0, description="rows for n-grams: times dimension, times 4 bytes of memory"
    )
    minimum_count: int = Field(default=3, gt=0, description="a rarer word is left out")
    rate: Positive = 0.1
    epochs: int = Field(default=5, gt=0)
    threads: int = Field(default=1, gt=0, le=256, description="more are faster and never give the same bytes twice")
    balanced: bool = Field(default=True, description="train on as many negatives as positives; never so held out")
    held_out: Share = Field(default=0.1, description="share of the judged documents it is measured on")


class Classify(Strict):
    """Which documents of the corpora are kept."""

    threshold: float = Field(default=0.4, ge=0, le=1, description="least probability of being positive")
    model: str | None = Field(
        default=None,
        description="a fastText model with labels __label__positive and __label__negative; by default trained",
    )
    least_informedness: float = Field(
        default=0.1, ge=-1, le=1, allow_inf_nan=False,
        description="of a trained one, held out, at the threshold (share it keeps of the positives less share of the "
        "negatives; 0 is chance): with less nothing is classified; -1 goes on with any",
    )  # fmt: skip
    most_kept: float = Field(
        default=0.99, gt=0, le=1, description="share of the documents; where more are kept nothing is refined; 1 does"
    )


class Refine(Question):
    """What is kept, written anew. Sampling parameters and the guard are our choice, for they are not published."""

    prompt: str = "recipes/prompts/refine_math.txt"
    temperature: float = Field(default=0.7, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=0.9, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int = Field(default=8192, gt=0)
    shortest: Positive = Field(default=0.3, description="characters of the answer over those of the document, at least")
    longest: Positive = Field(default=1.5, description="and at most")

    @model_validator(mode="after")
    def _leaves_room(self) -> Refine:
        if self.shortest >= self.longest:
            raise ValueError(f"shortest is {self.shortest} and longest {self.longest}: no answer could fit")
        return self


Step = Literal["sample", "judge", "train", "classify", "refine"]


class CurateConfig(Inputs):
    """Everything one curated corpus follows from. Steps that are not named are left out."""

    endpoint: Endpoint | None = None
    sample: Sample | None = None
    judge: Judge | None = None
    train: Train | None = None
    classify: Classify | None = None
    refine: Refine | None = None

    @property
    def steps(self) -> list[Step]:
        """Those that are to be done, in their order."""
        named: tuple[Step, ...] = ("sample", "judge", "train", "classify", "refine")
        return [step for step in named if getattr(self, step) is not None]

    def endpoint_of(self, question: Question) -> Endpoint:
        """The server a question goes to."""
        found = question.endpoint or self.endpoint
        assert found is not None
        return found

    @model_validator(mode="after")
    def _steps_fit(self) -> CurateConfig:
        if not self.corpora:
            raise ValueError("no corpora: name what is to be curated")
        for step, needed in (("judge", self.sample), ("train", self.judge)):
            if getattr(self, step) is not None and needed is None:
                raise ValueError(f"{step} needs {'sample' if step == 'judge' else 'judge'}, and it is not there")
        if self.classify and (self.classify.model is None) == (self.train is None):
            raise ValueError("classify needs a classifier: either train one, or name one as classify.model")
        if not self.steps:
            raise ValueError("no steps: name sample, judge, train, classify or refine")
        for step in ("judge", "refine"):
            question = getattr(self, step)
            if question is not None and (question.endpoint or self.endpoint) is None:
                raise ValueError(f"{step} asks a model, and no endpoint is named")
        return self

"""What a data build leaves out: duplicates, and what the benchmarks ask."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Seed, Strict


class NearDuplicates(Strict):
    """MinHash: documents whose sets of n-grams are alike share a bucket, the likelier the more alike they are.

    By the defaults of 100 pairs whose n-grams agree to 0.72, 65 are found, to 0.8, 92 and to 0.9 all.
    """

    ngram: int = Field(default=5, ge=1, le=64, description="words in a row; numbers are words like others")
    buckets: int = Field(default=14, gt=0, le=256)
    hashes_per_bucket: int = Field(default=8, gt=0, le=64)
    seed: Seed = 1


class Deduplicate(Strict):
    """Which documents count as the same; the first in the order of corpora, shards and places is kept.

    Corpora with a token budget come last in this order, whatever place they are named at.
    """

    exact: bool = Field(default=True, description="texts that agree but for case and white space")
    partitions: int = Field(
        default=16, gt=0, le=4096, description="parts the hashes are cut into: 40 bytes of memory for each of a part"
    )
    near: NearDuplicates | None = None

    @model_validator(mode="after")
    def _something(self) -> Deduplicate:
        if not self.exact and self.near is None:
            raise ValueError("exact is false and near is not set: leave deduplicate out")
        return self


class Benchmark(Strict):
    """A file of questions that no document may give away."""

    path: str = Field(description="jsonl, or one JSON array; may hold ${NAME} and ${NAME:-default}")
    like: str | None = Field(
        default=None, description="known benchmark whose columns the file has; by default the one of its name"
    )
    question: list[str] = Field(
        default=[], description="columns that make up a question, for a file unlike any known one"
    )
    id: str | None = Field(default=None, description="column that names it; by default the known one, or its place")
    absent: Literal["error", "ok"] = Field(
        default="error", description="ok: where the file is missing, the manifest says that nothing was compared"
    )


class Decontaminate(Strict):
    """What counts as giving a question away; `octo data decontaminate --measure` says how well it works.

    A document is a leak if it holds, word for word and wherever they stand, a third of the 13-grams of a question
    (`coverage`); or, in a row, 45% of its words (`quoted`) or 30 of them (`quoted_words`); or 90% of its 13-grams with
    other numbers (`changed_numbers`); or a question of fewer than 13 words whole. 13-grams that three different
    questions have count for nothing and end a row (`phrase`). What fewer questions have, or one alone, may still be
    everybody's, such as the definition of a term: therefore one 13-gram is not enough, but of a question of up to 28
    words.
    """

    against: dict[str, Benchmark] = Field(min_length=1, description="benchmarks by name")
    ngram: int = Field(default=13, ge=5, le=64, description="words in a row that are compared")
    coverage: float = Field(
        default=0.33, ge=0, le=1, description="share of a question's n-grams a document must hold; 0: any one is enough"
    )
    quoted: float | None = Field(
        default=0.45,
        gt=0,
        le=1,
        description="share of a question's words that is enough where they stand in a row; null: none is",
    )
    quoted_words: int = Field(
        default=30, ge=5, description="words in a row that are enough of however long a question, unless quoted is null"
    )
    changed_numbers: float | None = Field(
        default=0.9, gt=0, le=1, description="that share with all numbers taken as equal; null: numbers must agree"
    )
    phrase: int = Field(default=3, ge=2, description="an n-gram of so many different questions is a common phrase")
    short: int = Field(
        default=8, ge=2, description="questions of fewer words count only as a sentence or a line of their own"
    )
    measure: int = Field(
        default=200, ge=0, description="questions of each benchmark planted to measure recall and precision; 0: none"
    )

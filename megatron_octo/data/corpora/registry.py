"""Every corpus of the recipe and of the wider field: where it is, what its records hold, how they become text."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_octo.config.data import Inputs
from megatron_octo.data.corpora import render
from megatron_octo.errors import ConfigError

Status = Literal["published", "remembered"]


@dataclass(frozen=True)
class Field:
    """A field that an adapter reads.

    Args:
        name: in the corpus as it is published.
        text: it must be a text with something in it; else the renderer judges it.
        optional: it may be missing or null.
    """

    name: str
    text: bool = True
    optional: bool = False


@dataclass(frozen=True)
class Figure:
    """A size, and how well it is known: `published` by the corpus's authors or users, or `remembered`, unchecked."""

    value: float
    status: Status = "published"


@dataclass(frozen=True)
class Adapter:
    """A corpus, or a shape that many files have.

    Args:
        name: as configurations say it.
        title: what it is.
        fields: what is read of each record; the renderer takes them in this order.
        render: makes the text of a document.
        question: takes the same fields and returns the question the record asks; None where it asks none.
        hub: id of the data set on the Hugging Face hub; None for a shape.
        files: glob of its files there.
        form: how the files are written there.
        licence: of the corpus.
        gated: who may read it there; empty where anybody may.
        tokens: of the whole corpus, by the count its users give.
        documents: records of it.
        refused: why it cannot be read, and the way out.
    """

    name: str
    title: str
    fields: tuple[Field, ...]
    render: Callable[..., str]
    question: Callable[..., str] | None = None
    hub: str | None = None
    files: str = ""
    form: str = ""
    licence: str = ""
    gated: str = ""
    tokens: Figure | None = None
    documents: Figure | None = None
    refused: tuple[str, str] | None = None


def _first(question: str, *_: Any) -> str:
    return question


def _first_turn(turns: Any, *_: Any) -> str:
    return render.first_turn(turns)


_TEXT = (Field("text"),)
_QUESTION_ANSWER = (Field("question"), Field("answer"))
_MESSAGES = (Field("messages", text=False),)
_ODC_BY, _APACHE, _CC_BY = "ODC-By 1.0", "Apache-2.0", "CC-BY-4.0"

_SHAPES = (
    Adapter("text", "documents, each a text", _TEXT, render.as_is),
    Adapter("qa", "questions and answers, as they stand in prompts", _QUESTION_ANSWER, render.prompted, _first),
    Adapter("gsm8k", "GSM8K's questions and worked answers", _QUESTION_ANSWER, render.gsm8k, _first),
    Adapter("messages", "conversations of user and assistant", _MESSAGES, render.conversation, _first_turn),
)


def _mega_math(
    part: str, title: str, tokens: float, status: Status = "published", refused: tuple[str, str] | None = None
) -> Adapter:
    return Adapter(
        f"megamath-{part}", f"MegaMath: {title}", _TEXT, render.as_is, hub="LLM360/MegaMath",
        files=f"megamath-{part}/**/*.parquet", form="parquet", licence=_ODC_BY, tokens=Figure(tokens, status),
        refused=refused,
    )  # fmt: skip


_MEGA_MATH = (
    _mega_math("web", "pages of Common Crawl", 263.9e9),
    _mega_math("web-pro", "the best of its pages, refined", 13.0e9),
    Adapter(
        "megamath-web-pro-max", "MegaMath-Web-Pro-Max: pages of MegaMath, refined", _TEXT, render.as_is,
        hub="OctoThinker/MegaMath-Web-Pro-Max", files="**/*.parquet", form="parquet", licence=_ODC_BY,
        gated="after filling in a form, for non-commercial use", tokens=Figure(73.8e9),
    ),
    _mega_math("text-code-block", "text and code by turns, synthetic", 50.3e9),
    _mega_math("qa", "questions and answers, synthetic", 5.94e9),
    _mega_math("translated-code", "code translated to Python", 7.2e9),
    _mega_math(
        "code", "mathematical code", 28.1e9,
        refused=(
            "its files have no text: they name files of repositories, which Software Heritage keeps",
            "fetch these files from Software Heritage, write each as a text field, and read that with adapter text; "
            "or give its share to megamath-translated-code",
        ),
    ),
)  # fmt: skip


def _fine_math(name: str, title: str, tokens: float, documents: float) -> Adapter:
    return Adapter(
        name, title, _TEXT, render.as_is, hub="HuggingFaceTB/finemath", files=f"{name}/*.parquet", form="parquet",
        licence=_ODC_BY, tokens=Figure(tokens), documents=Figure(documents),
    )  # fmt: skip


_WEB = (
    Adapter(
        "dclm-baseline", "DCLM-Baseline: filtered pages of Common Crawl", _TEXT, render.as_is,
        hub="mlfoundations/dclm-baseline-1.0", files="**/*.jsonl.zst", form="jsonl.zst", licence=_CC_BY,
        tokens=Figure(4e12),
    ),
    Adapter(
        "openwebmath", "OpenWebMath: mathematical pages", _TEXT, render.as_is, hub="open-web-math/open-web-math",
        files="data/*.parquet", form="parquet", licence=_ODC_BY, tokens=Figure(14.7e9), documents=Figure(6_315_233),
    ),
    Adapter(
        "mathpile", "MathPile: papers, textbooks, pages, proofs", _TEXT, render.as_is, hub="GAIR/MathPile",
        files="train/**/*.jsonl.gz", form="jsonl.gz", licence="CC BY-NC-SA 4.0", gated="after agreeing to its terms",
        tokens=Figure(9.5e9, "remembered"),
    ),
    Adapter(
        "mathpile-commercial", "MathPile, its part for commercial use", _TEXT, render.as_is,
        hub="GAIR/MathPile_Commercial", files="train/**/*.jsonl.gz", form="jsonl.gz", licence="CC BY-SA 4.0",
        gated="after agreeing to its terms", tokens=Figure(9.2e9, "remembered"),
    ),
    Adapter(
        "infimm-webmath", "InfiMM-WebMath-40B: mathematical pages, text between images; English and Chinese",
        (Field("text_list", text=False),), render.joined, hub="Infi-MM/InfiMM-WebMath-40B", files="**/*.parquet",
        form="parquet", licence=_ODC_BY, tokens=Figure(40e9), documents=Figure(24e6),
    ),
    _fine_math("finemath-3plus", "FineMath: pages with a score of 3 or more", 34e9, 21_405_610),
    _fine_math("finemath-4plus", "FineMath: pages with a score of 4 or more", 9.57e9, 6_699_493),
    _fine_math("infiwebmath-3plus", "InfiMM-WebMath rescored: 3 or more", 20.5e9, 13.9e6),
    _fine_math("infiwebmath-4plus", "InfiMM-WebMath rescored: 4 or more", 8.5e9, 6.3e6),
)  # fmt: skip

_LONG = (
    Adapter(
        "openr1-math-220k", "OpenR1-Math-220k: thinking of DeepSeek-R1; the first verified, complete generation",
        (
            Field("problem"), Field("generations", text=False), Field("correctness_math_verify", text=False),
            Field("correctness_llama", text=False, optional=True), Field("is_reasoning_complete", text=False),
            Field("answer", text=False, optional=True),
        ),
        render.first_verified, _first, hub="open-r1/OpenR1-Math-220k", files="data/*.parquet", form="parquet",
        licence=_APACHE, tokens=Figure(1.05e9), documents=Figure(93_733),
    ),
    Adapter(
        "am-deepseek-distilled-40m", "AM-DeepSeek-Distilled-40M, mathematics: thinking of DeepSeek-R1 and its kin",
        (
            Field("question"), Field("answer"), Field("ground_truth_answer", text=False, optional=True),
            Field("verify_score", text=False, optional=True),
        ),
        render.verified_thoughts, _first, hub="a-m-team/AM-DeepSeek-Distilled-40M", files="**/math_*.jsonl",
        form="jsonl", licence="CC-BY-NC-4.0", documents=Figure(40e6, "remembered"),
    ),
    Adapter(
        "openmathreasoning-tir", "OpenMathReasoning, tool-integrated: thinking with code and its output",
        (Field("problem"), Field("generated_solution"), Field("expected_answer", text=False, optional=True)),
        render.thoughts, _first, hub="nvidia/OpenMathReasoning", files="data/tir-*.parquet", form="parquet",
        licence=_CC_BY, documents=Figure(1.7e6),
    ),
)  # fmt: skip

_SHORT = (
    Adapter(
        "openmathinstruct-2", "OpenMathInstruct-2: short solutions of Llama-3.1-405B",
        (Field("problem"), Field("generated_solution")), render.pair, _first, hub="nvidia/OpenMathInstruct-2",
        files="data/train-*.parquet", form="parquet", licence=_CC_BY, documents=Figure(14e6),
    ),
    Adapter(
        "numinamath-1.5", "NuminaMath-1.5: competition problems; those with a valid problem and solution",
        (
            Field("problem"), Field("solution", text=False, optional=True),
            Field("problem_is_valid", text=False, optional=True), Field("solution_is_valid", text=False, optional=True),
        ),
        render.valid_pair, _first, hub="AI-MO/NuminaMath-1.5", files="data/*.parquet", form="parquet",
        licence=_APACHE, documents=Figure(896_215),
    ),
    Adapter(
        "openmathinstruct-1", "OpenMathInstruct-1: solutions of Mixtral with code and its output; the right ones",
        (Field("question"), Field("generated_solution"), Field("is_correct", text=False)), render.correct_pair, _first,
        hub="nvidia/OpenMathInstruct-1", files="correct_solutions/*.jsonl", form="jsonl", licence="NVIDIA licence",
        documents=Figure(1.8e6),
    ),
)  # fmt: skip

_INSTRUCTION = (
    Adapter(
        "tulu-3-personas-if", "Tulu 3: instructions with constraints, by personas", _MESSAGES, render.conversation,
        _first_turn, hub="allenai/tulu-3-sft-personas-instruction-following", files="data/*.parquet", form="parquet",
        licence=_ODC_BY, tokens=Figure(0.01e9), documents=Figure(30e3),
    ),
    Adapter(
        "wildchat", "WildChat-1M: conversations of people with chatbots; those with GPT-4",
        (Field("conversation", text=False), Field("model")), render.conversation_of_gpt_4, _first_turn,
        hub="allenai/WildChat-1M", files="data/*.parquet", form="parquet", licence=_ODC_BY, tokens=Figure(0.29e9),
        documents=Figure(1e6),
    ),
    Adapter(
        "ultrachat-200k", "UltraChat-200k: conversations of two chatbots, filtered", _MESSAGES, render.conversation,
        _first_turn, hub="HuggingFaceH4/ultrachat_200k", files="data/train_sft-*.parquet", form="parquet",
        licence="MIT", tokens=Figure(0.51e9), documents=Figure(200e3),
    ),
)  # fmt: skip

ADAPTERS = {adapter.name: adapter for adapter in (*_SHAPES, *_MEGA_MATH, *_WEB, *_LONG, *_SHORT, *_INSTRUCTION)}


def find_adapter(name: str, where: str) -> Adapter:
    """The adapter of a name.

    Args:
        name: as a configuration says it.
        where: the field that says it, for the message.

    Raises:
        ConfigError: there is none.
    """
    if name not in ADAPTERS:
        near = difflib.get_close_matches(name, ADAPTERS, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"adapters are {', '.join(ADAPTERS)}"
        raise ConfigError(f"{where} = {name!r}: there is no such adapter", "it says what the records are", fix)
    return ADAPTERS[name]


def adapter_of(config: Inputs, name: str) -> Adapter:
    """The adapter of a corpus of a build.

    Raises:
        ConfigError: there is none of its name, it cannot be read, or `fields` names a field that it does not have.
    """
    where, corpus = f"corpora.{name}", config.corpora[name]
    adapter = find_adapter(corpus.adapter, f"{where}.adapter")
    if adapter.refused:
        why, fix = adapter.refused
        raise ConfigError(f"{where}: {adapter.name} cannot be read", why, fix)
    if corpus.rendering != "published" and adapter.question is not _first:
        raise ConfigError(
            f"{where}.rendering = {corpus.rendering!r} with adapter {adapter.name}",
            "only questions with solutions have other forms",
            "leave it out, or name an adapter of such a corpus",
        )
    known = [field.name for field in adapter.fields]
    for field in corpus.fields:
        if field not in known:
            rule = f"adapter {adapter.name} reads {', '.join(known)}"
            raise ConfigError(f"{where}.fields: unknown field {field!r}", rule, "write fields: {its name: name here}")
    return adapter


def describe(adapter: Adapter) -> dict[str, Any]:
    """Facts about an adapter for people and machines."""

    def size(figure: Figure | None) -> str:
        if figure is None:
            return ""
        unit, letter = next(
            (unit, letter) for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")) if figure.value >= unit
        )
        return f"{figure.value / unit:.4g}{letter}{' ?' if figure.status == 'remembered' else ''}"

    return {
        "name": adapter.name,
        "title": adapter.title,
        "hub": adapter.hub,
        "files": adapter.files,
        "form": adapter.form,
        "fields": {field.name: "optional" if field.optional else "required" for field in adapter.fields},
        "renderer": (adapter.render.__doc__ or "").partition("\n")[0],
        "licence": adapter.licence,
        "gated": adapter.gated,
        "tokens": size(adapter.tokens),
        "documents": size(adapter.documents),
        "refused": "; ".join(adapter.refused) if adapter.refused else "",
    }

"""Problems -> the prompt file OpenRLHF reads: complete texts, in a fixed order, exactly as many as the run uses."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_octo.errors import DataError
from megatron_octo.evaluate.problems import read_problems
from megatron_octo.evaluate.prompts import build_prompt
from megatron_octo.files import write_text
from megatron_octo.rl.tokens import SpecialTexts


@dataclass(frozen=True)
class PromptFacts:
    """What became of the problems.

    Args:
        problems: problems read.
        overlong: problems left out because their prompt is longer than the cap.
        prompts: rows written.
        sha256: hash of the written file.
    """

    problems: int
    overlong: int
    prompts: int
    sha256: str


def write_prompts(
    problems: Path, out: Path, *, template: str, count: int, seed: int, max_tokens: int, tokenizer: SpecialTexts,
    bos: bool = False,
) -> PromptFacts:  # fmt: skip
    """Write the prompts of a run.

    OpenRLHF has no step limit: a run ends when its prompt file does. So the problems are shuffled by the seed and
    repeated, pass after pass, until there are `count` rows. Prompts are complete texts; no template flag is needed.

    Args:
        problems: jsonl, one {"id", "question", "answer"} a line.
        out: jsonl to write, columns prompt, label, datasource; replaced atomically.
        template: name known to `megatron_octo.evaluate.prompts`.
        count: rows, i.e. rollouts x prompts of a rollout.
        seed: of the order.
        max_tokens: longest prompt; OpenRLHF would cut a longer one from the left without a word.
        tokenizer: of the model; it counts.
        bos: begin each prompt with the tokenizer's BOS text.

    Raises:
        DataError: the file is missing or damaged, no problem fits, or a BOS is asked for and there is none.
    """
    if bos and tokenizer.bos is None:
        raise DataError("rl.bos = true, and the tokenizer has no begin-of-text token", fix="set rl.bos to false")
    read = read_problems(problems)
    rows = [(build_prompt(template, one.question, tokenizer.bos if bos else None), one.answer) for one in read]
    fitting = [row for row in rows if tokenizer.length(row[0]) <= max_tokens]
    if not fitting:
        raise DataError(
            f"{problems}: no problem has a prompt of at most {max_tokens} tokens",
            f"{len(rows)} problems were read",
            "raise rl.max_prompt",
        )
    lines = [
        {"prompt": prompt, "label": answer, "datasource": problems.stem}
        for prompt, answer in _cycle(fitting, count, seed)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(out, text)
    return PromptFacts(len(rows), len(rows) - len(fitting), count, hashlib.sha256(text.encode()).hexdigest())


def split_prompts(prompts: Path, counts: list[int], out: Callable[[int], Path]) -> list[Path]:
    """Cut a prompt file into consecutive parts of `counts` rows; part i goes to `out(i)`."""
    with prompts.open(encoding="utf-8") as file:
        lines = list(file)  # not splitlines(), which would cut inside a text at other separators than the line feed
    paths, start = [], 0
    for number, count in enumerate(counts):
        paths.append(out(number))
        write_text(paths[-1], "".join(lines[start : start + count]))
        start += count
    return paths


def _cycle(rows: list, count: int, seed: int) -> Iterator:
    """`count` rows: passes over all of them, each pass in an order of its own."""
    for turn in range(-(-count // len(rows))):
        order = random.Random(f"{seed}/{turn}").sample(rows, len(rows))
        yield from order[: count - turn * len(rows)]

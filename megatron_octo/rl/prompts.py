"""Problems -> the prompt file OpenRLHF reads: complete texts, in a fixed order, exactly as many as the run uses."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_octo.errors import DataError
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
    problems: Path, out: Path, *, template: str, count: int, seed: int, max_tokens: int,
    tokenizer: SpecialTexts | None = None, bos: bool = False,
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
        tokenizer: of the model; it counts. Without one, characters are counted.
        bos: begin each prompt with the tokenizer's BOS text.

    Raises:
        DataError: the file is missing or damaged, or no problem fits.
    """
    from megatron_octo.evaluate.prompts import build_prompt

    read = list(read_problems(problems))
    length, start = (tokenizer.length, tokenizer.bos) if tokenizer else (len, None)
    rows = [(build_prompt(template, row["question"], start if bos else None), row) for row in read]
    fitting = [(prompt, row) for prompt, row in rows if length(prompt) <= max_tokens]
    if not fitting:
        raise DataError(
            f"{problems}: no problem has a prompt of at most {max_tokens} tokens",
            f"{len(rows)} problems were read",
            "raise rl.max_prompt",
        )
    lines = [_row(prompt, row, problems.stem) for prompt, row in _cycle(fitting, count, seed)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(out, text)
    return PromptFacts(len(rows), len(rows) - len(fitting), count, hashlib.sha256(text.encode()).hexdigest())


def read_problems(path: Path) -> Iterator[dict[str, str]]:
    """Read problems, checking each line.

    Raises:
        DataError: missing file, a line that is not an object with a question and an answer, or no line at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})", fix="name the problems file of the run") from None
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            yield {**row, "question": _text(row["question"]), "answer": _text(row["answer"])}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}, line {number}: not a problem ({type(error).__name__}: {error})",
                'each line is an object such as {"id": "a", "question": "1+1?", "answer": "2"}',
                "mend or remove the line",
            ) from None
    if not number:
        raise DataError(f"{path}: holds no problem")


def split_prompts(prompts: Path, counts: list[int], out: Callable[[int], Path]) -> list[Path]:
    """Cut a prompt file into consecutive parts of `counts` rows; part i goes to `out(i)`."""
    lines = prompts.read_text(encoding="utf-8").splitlines(keepends=True)
    paths, start = [], 0
    for number, count in enumerate(counts):
        paths.append(out(number))
        write_text(paths[-1], "".join(lines[start : start + count]))
        start += count
    return paths


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically, making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or str(value).strip() == "":
        raise TypeError(f"{value!r} is not a text")
    return str(value)


def _cycle(rows: list, count: int, seed: int) -> Iterator:
    """`count` rows: passes over all of them, each pass in an order of its own."""
    for turn in range(-(-count // len(rows))):
        order = random.Random(f"{seed}/{turn}").sample(rows, len(rows))
        yield from order[: count - turn * len(rows)]


def _row(prompt: str, row: dict[str, str], source: str) -> dict[str, str]:
    return {"prompt": prompt, "label": row["answer"], "datasource": str(row.get("datasource", source))}

"""Named prompt templates; reinforcement learning and evaluation build their prompts here and nowhere else."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megatron_octo.errors import ConfigError

_PLACE = "{question}"


@dataclass(frozen=True)
class Template:
    """A prompt with one place for the question.

    Args:
        text: the prompt; `{question}` stands where the question goes, every other brace is literal.
        stop: strings that end a response besides the end-of-text token.
    """

    text: str
    stop: tuple[str, ...] = ()


TEMPLATES: dict[str, Template] = {
    "world": Template("Question: {question}\nAnswer:"),
    # OctoThinker (arXiv 2506.20512), template study: no spaces after the colons.
    "octothinker-simple": Template("Question:{question}\nAnswer:"),
    # Same study; wording and stop strings of the authors' public evaluation code.
    "octothinker-complex": Template(
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. User: You must put your answer inside \\boxed{} and Your final answer will be extracted "
        "automatically by the \\boxed{} tag.\n{question}\nAssistant:",
        stop=("User:", "Assistant:"),
    ),
}


def template(name: str) -> Template:
    """Look a template up.

    Raises:
        ConfigError: no template of that name; the nearest one is shown.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.3)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(f"unknown prompt template '{name}'", fix=f"{hint}templates: {', '.join(TEMPLATES)}")


def build_prompt(name: str, question: str, tokenizer_bos: str | None = None) -> str:
    """Put a question into a template.

    Args:
        name: a key of `TEMPLATES`.
        question: any text. It is inserted as it stands: braces and percent signs in it mean nothing.
        tokenizer_bos: text of the begin-of-text token, for models trained with one; the project's are not.

    Returns:
        The prompt, to be tokenised without adding special tokens.

    Raises:
        ConfigError: unknown template.
    """
    before, _, after = template(name).text.partition(_PLACE)
    return f"{tokenizer_bos or ''}{before}{question}{after}"

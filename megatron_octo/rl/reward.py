"""The reward of a rollout: the project's one grader, in the shape OpenRLHF calls.

OpenRLHF loads a file and calls its `reward_func` once for each response, in a thread, and swallows whatever it
raises; the run then dies later of a missing reward. So nothing may escape from here, and what went wrong is counted
in the logs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Grade = Callable[..., Any]
Values = dict[str, float]

LOGS = ("correct", "format", "stopped", "response_chars", "reward_errors")
"""Names of the extra logs; every response has all of them, for OpenRLHF averages only what each sample has."""

_NOTHING: Values = dict.fromkeys(LOGS, 0.0)


def reward_file(eos: Sequence[str], pad: str | None, require_stop: bool) -> str:
    """The text of the reward file of one run: its special tokens and rules are written into it.

    A file and not environment variables, because it reaches every node of a cluster with the run's other files.
    """
    return (
        '"""The reward of this run; written by megatron_octo."""\n\n'
        "from megatron_octo.rl.reward import Reward\n\n"
        f"reward_func = Reward(eos={tuple(eos)!r}, pad={pad!r}, require_stop={require_stop!r})\n"
    )


@dataclass(frozen=True)
class Reward:
    """`reward_func(queries, prompts, labels)` of one run.

    Args:
        eos: texts of the tokens that end a response.
        pad: text of the padding token, if any.
        require_stop: a response that did not end with EOS earns nothing.
        grade: the grader; the project's own by default.
    """

    eos: tuple[str, ...]
    pad: str | None = None
    require_stop: bool = True
    grade: Grade | None = None

    def __call__(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any) -> dict:
        """Reward responses.

        Args:
            queries: prompt, response and special tokens, decoded.
            prompts: the prompts alone.
            labels: right answers.

        Returns:
            rewards and scores in {0, 1} and extra_logs; plain numbers for one response (all OpenRLHF 0.11.2 sends),
            lists for several.
        """
        judged = [self._one(query, prompts[i], labels[i]) for i, query in enumerate(queries)]
        columns = {name: [values[name] for values in judged] for name in ("reward", *LOGS)}
        if len(judged) == 1:
            plain = {name: column[0] for name, column in columns.items()}
            reward = plain.pop("reward")
            return {"rewards": reward, "scores": reward, "extra_logs": plain}
        rewards = columns.pop("reward")
        return {"rewards": rewards, "scores": rewards, "extra_logs": columns}

    def _one(self, query: str, prompt: str, label: str) -> Values:
        values = _NOTHING | {"reward": 0.0}
        try:
            response, stopped = self.split(response_of(query, prompt))
            values |= {"stopped": float(stopped), "response_chars": float(len(response))}
            verdict = (self.grade or _grader())(response, label, stopped=stopped, require_stop=self.require_stop)
            correct = float(bool(verdict.correct))
            return values | {"format": float(verdict.extracted is not None), "correct": correct, "reward": correct}
        except Exception:  # see the module's note: an escape would kill the run later, far from its cause
            return values | {"reward": 0.0, "reward_errors": 1.0}

    def split(self, text: str) -> tuple[str, bool]:
        """Part a response from the token that ended it.

        Only an EOS at the very end counts: generation stops at a real one, so a text that goes on merely spells it.

        Returns:
            The response without EOS and padding, and whether it was ended by EOS.
        """
        while self.pad and self.pad not in self.eos and text.endswith(self.pad):
            text = text.removesuffix(self.pad)
        for mark in self.eos:
            if mark and text.endswith(mark):
                return text.removesuffix(mark), True
        return text, False


def response_of(query: str, prompt: str) -> str:
    """The text after the prompt.

    The exact prefix as a rule. A prompt whose decoding differs from it in white space is found all the same; a
    `\\boxed{}` inside the prompt's own instruction is never graded.

    Raises:
        ValueError: the query does not begin with the prompt in any of these ways.
    """
    if query.startswith(prompt):
        return query[len(prompt) :]
    position = _after_spaced(query, prompt)
    if position is None:
        raise ValueError("the query does not begin with its prompt")
    return query[position:]


def _after_spaced(query: str, prompt: str) -> int | None:
    """Where the prompt ends in the query when white space is not compared; None if it is not there."""
    position = 0
    for letter in prompt:
        if letter.isspace():
            continue
        while position < len(query) and query[position].isspace():
            position += 1
        if position == len(query) or query[position] != letter:
            return None
        position += 1
    return position


def _grader() -> Grade:
    from megatron_octo.evaluate.grade import grade

    return grade

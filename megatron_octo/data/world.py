"""A tiny world of mathematics: seeded text that a model of under a million parameters learns on a CPU.

Somebody has some things, then the number changes twice. Everything the campaign needs grows from that: prose to learn
the numbers from, short and long worked answers to decay on, conversations, and problems to reinforce and test with.

Three choices make it learnable and leave reinforcement learning something to do:

- All questions have the same shape, so an operand always stands equally far from where it is used.
- Which problems are held out is decided by a hash of the whole computation. Every single step still occurs in
  training, so a held-out problem asks for a new composition and not for an unknown fact.
- Worked answers are written by people in a hurry: some contain a slip, and some state the result without a box.
  A model that imitates them perfectly is therefore right less than half of the time.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_octo.errors import ConfigError

KINDS = ("web", "short_cot", "long_cot", "instruction")
QUESTION_TEMPLATE = "Question: {question}\nAnswer:"

Split = Literal["train", "heldout"]

_NAMES = ("Ana", "Ben", "Mia", "Tom")
_ITEMS = ("books", "coins", "pens", "shells")
_GAINS = ("finds", "buys")
_LOSSES = ("sells", "loses")
_SLIPS = (-2, -1, 1, 2)


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}={value!r} of the tiny world", f"allowed: {allowed}", f"change {field}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """How large the world is and how carelessly its worked answers are written.

    The defaults are the demo's: small enough to be learnt in under a million tokens on every seed tried.

    Args:
        highest_number: Every number that occurs lies in 0..highest_number.
        largest_change: A step adds or takes away 1..largest_change.
        steps: Steps of a problem, 1 to 3.
        heldout_share: Share of all computations kept out of every training text, in (0, 1).
        slip_rate: Share of worked answers in which one step is off by one or two.
        noticed_rate: Share of the slips that the self-check of a long answer notices and repairs.
        unboxed_rate: Share of worked answers that state the result without a box.

    Raises:
        ConfigError: A value is outside its range; the message names the field, the value and the rule.
    """

    highest_number: int = 20
    largest_change: int = 5
    steps: int = 2
    heldout_share: float = 0.22
    slip_rate: float = 0.3
    noticed_rate: float = 0.4
    unboxed_rate: float = 0.4

    def __post_init__(self) -> None:
        _require(3 <= self.highest_number <= 99, "highest_number", self.highest_number, "3 to 99")
        below = self.highest_number
        _require(1 <= self.largest_change < below, "largest_change", self.largest_change, f"1 to {below - 1}")
        _require(1 <= self.steps <= 3, "steps", self.steps, "1 to 3")
        for field in ("heldout_share", "slip_rate", "noticed_rate", "unboxed_rate"):
            _require(0 <= getattr(self, field) <= 1, field, getattr(self, field), "0 to 1")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its right answer.

    Args:
        id: The computation, such as ``7+5-3``; two problems with the same id ask for the same thing.
        question: The bare question, to be placed into ``QUESTION_TEMPLATE``.
        answer: The right result in decimal digits.
    """

    id: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Computation:
    """A start and signed changes, as somebody wrote it down: a slip at step ``slipped`` shifts every later total."""

    start: int
    changes: tuple[int, ...]
    slipped: int = 0
    shift: int = 0

    @property
    def id(self) -> str:
        return str(self.start) + "".join(f"{change:+d}" for change in self.changes)

    @property
    def totals(self) -> list[int]:
        """The written running totals, start included."""
        right = itertools.accumulate(self.changes, initial=self.start)
        return [total + self.shift * (step > self.slipped) for step, total in enumerate(right)]

    @property
    def result(self) -> int:
        return self.totals[-1]

    def equations(self) -> list[str]:
        """The steps in the order of the story."""
        totals = self.totals
        return [f"{a}{change:+d}={b}." for a, change, b in zip(totals, self.changes, totals[1:], strict=False)]

    def inverse(self) -> "_Computation":
        """The way back from the written result; it ends at the start unless there was a slip."""
        return _Computation(self.result, tuple(-change for change in reversed(self.changes)))


class World:
    """The generator of every text and problem of the demo.

    Args:
        config: Sizes and rates of the world.
        seed: Texts and problems are a function of the seed; which computations are held out is not, so that
            models of different seeds are tested on the same side of the fence.

    Raises:
        ConfigError: The world is so small that one side of the fence is empty.
    """

    def __init__(self, config: WorldConfig = WorldConfig(), seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._pools: dict[str, list[_Computation]] = {"train": [], "heldout": []}
        for computation in _all_computations(config, config.steps):
            heldout = _position_at_fence(computation) < config.heldout_share
            self._pools["heldout" if heldout else "train"].append(computation)
        if not all(self._pools.values()):
            raise ConfigError(
                f"{config}: one side of the split is empty",
                "some computations must be held out and some must not",
                "raise highest_number or steps, or move heldout_share",
            )
        self._trained = frozenset(self._pools["train"])
        self._facts = _all_computations(config, 1)
        self._writers = {
            "web": self._web,
            "short_cot": self._short_cot,
            "long_cot": self._long_cot,
            "instruction": self._instruction,
        }

    def documents(self, kind: str, count: int, stream: str = "") -> Iterator[str]:
        """Writes training documents; none contains a held-out computation.

        Args:
            kind: One of ``KINDS``.
            count: How many documents.
            stream: Name of an independent random stream, such as the stage that will read the text.

        Returns:
            An iterator over the texts, the same for equal seed, kind and stream; no end-of-text marks.

        Raises:
            ConfigError: The kind is unknown.
        """
        if kind not in self._writers:
            raise ConfigError(f"document kind {kind!r}", "no such kind", f"one of {', '.join(KINDS)}")
        rng = random.Random(f"{self.seed}/documents/{kind}/{stream}")
        return (self._writers[kind](rng) for _ in range(count))

    def available(self, split: Split) -> int:
        """Counts the distinct problems of one side of the fence.

        Args:
            split: ``train`` or ``heldout``.

        Returns:
            The largest ``count`` that ``problems`` accepts.

        Raises:
            ConfigError: The split is unknown.
        """
        if split not in self._pools:
            raise ConfigError(f"split {split!r} of the problems", "no such split", "train or heldout")
        return len(self._pools[split])

    def problems(self, split: Split, count: int, stream: str = "") -> Iterator[Problem]:
        """Draws distinct problems from one side of the fence.

        Args:
            split: ``train`` for reinforcement learning, ``heldout`` for evaluation.
            count: How many problems, at most the number of computations on that side.
            stream: Name of an independent random stream.

        Returns:
            An iterator over problems whose ids all differ, the same for equal seed, split and stream.

        Raises:
            ConfigError: The split is unknown or has fewer computations than asked for.
        """
        if count > (most := self.available(split)):
            raise ConfigError(
                f"{count} {split} problems asked for",
                f"this world has {most} distinct ones",
                "ask for fewer, or raise highest_number",
            )
        rng = random.Random(f"{self.seed}/problems/{split}/{stream}")
        return (Problem(c.id, _question(c, rng), str(c.result)) for c in rng.sample(self._pools[split], count))

    def _draw(self, rng: random.Random) -> _Computation:
        return rng.choice(self._pools["train"])

    def _hurried(self, right: _Computation, rng: random.Random) -> _Computation:
        """The computation as written in a hurry: with probability ``slip_rate`` one step is wrong.

        The way back from a slip is a right computation too, of a shifted start, so that one has to be on the
        training side of the fence.
        """
        if rng.random() >= self.config.slip_rate:
            return right
        possible = [
            _Computation(right.start, right.changes, slipped, shift)
            for slipped in range(self.config.steps)
            for shift in _SLIPS
            if _Computation(right.start + shift, right.changes) in self._trained
        ]
        return rng.choice(possible) if possible else right

    def _stated(self, result: int, rng: random.Random) -> str:
        return str(result) if rng.random() < self.config.unboxed_rate else rf"\boxed{{{result}}}"

    def _short_cot(self, rng: random.Random) -> str:
        computation = self._draw(rng)
        written = self._hurried(computation, rng)
        answer = [*written.equations(), f"So {self._stated(written.result, rng)}."]
        return " ".join([_prompt(computation, rng), *answer])

    def _long_cot(self, rng: random.Random) -> str:
        computation = self._draw(rng)
        written = self._hurried(computation, rng)
        answer = [*_in_words(written), "Wait, let me check.", *written.inverse().equations()]
        if written.shift and rng.random() < self.config.noticed_rate:
            written = computation
            answer += ["No, that is wrong.", *written.equations(), "Now"]
        else:
            answer += ["Yes,"]
        answer += [f"the answer is {self._stated(written.result, rng)}."]
        return " ".join([_prompt(computation, rng), *answer])

    def _instruction(self, rng: random.Random) -> str:
        if rng.random() < 0.5:
            fact = rng.choice(self._facts)
            return f"User: What is {fact.id}?\nAssistant: {fact.equations()[0]} It is {fact.result}."
        computation = self._draw(rng)
        steps = " ".join(computation.equations())
        return f"User: {_question(computation, rng)}\nAssistant: {steps} There are {computation.result}."

    def _web(self, rng: random.Random) -> str:
        passages = (self._worked_question, self._story, self._fact_list, self._fact_in_words, self._neighbours)
        return rng.choices(passages, weights=(45, 15, 20, 15, 5))[0](rng)

    def _worked_question(self, rng: random.Random) -> str:
        computation = self._draw(rng)
        steps = _in_words(computation) if rng.random() < 0.5 else computation.equations()
        return " ".join([_question(computation, rng), "We count:", *steps])

    def _story(self, rng: random.Random) -> str:
        computation = self._draw(rng)
        return " ".join([_story(computation, rng), f"In short: {computation.id}.", *computation.equations()])

    def _fact_list(self, rng: random.Random) -> str:
        """Unrelated facts; one never goes on where the last one ended, lest a list spell out a held-out problem."""
        facts: list[_Computation] = []
        for fact in rng.choices(self._facts, k=rng.randint(4, 8)):
            if not facts or facts[-1].result != fact.start:
                facts.append(fact)
        return " ".join(["Some facts:", *(fact.equations()[0] for fact in facts)])

    def _fact_in_words(self, rng: random.Random) -> str:
        fact = rng.choice(self._facts)
        sign, amount = ("plus" if fact.changes[0] > 0 else "minus"), abs(fact.changes[0])
        there, back = fact.equations()[0], fact.inverse().equations()[0]
        return f"{fact.start} {sign} {amount} is {fact.result}: {there} Back again: {back}"

    def _neighbours(self, rng: random.Random) -> str:
        number = rng.randint(1, self.config.highest_number - 1)
        return f"After {number} comes {number + 1}, and before {number} comes {number - 1}."


def _all_computations(config: WorldConfig, steps: int) -> list[_Computation]:
    """Every computation whose numbers all lie in the world; a story starts with at least one thing."""
    amounts = range(1, config.largest_change + 1)
    changes = itertools.product([*(-n for n in amounts), *amounts], repeat=steps)
    paths = itertools.product(range(1, config.highest_number + 1), changes)
    computations = itertools.starmap(_Computation, paths)
    return [c for c in computations if min(c.totals) >= 0 and max(c.totals) <= config.highest_number]


def _position_at_fence(computation: _Computation) -> float:
    """A uniform number in [0, 1) that depends on the computation alone and is the same for its inverse.

    The self-check of a long answer computes backwards, so both directions belong on one side.
    """
    text = min(computation.id, computation.inverse().id)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _question(computation: _Computation, rng: random.Random) -> str:
    return f"{_story(computation, rng)} How many now?"


def _story(computation: _Computation, rng: random.Random) -> str:
    verbs = [f"{rng.choice(_GAINS if c > 0 else _LOSSES)} {abs(c)}" for c in computation.changes]
    opening = f"{rng.choice(_NAMES)} has {computation.start} {rng.choice(_ITEMS)}"
    return f"{', '.join([opening, *verbs])}."


def _prompt(computation: _Computation, rng: random.Random) -> str:
    return QUESTION_TEMPLATE.format(question=_question(computation, rng))


def _in_words(computation: _Computation) -> list[str]:
    openings = itertools.chain(["First,"], itertools.repeat("Then,"))
    return [f"{opening} {step}" for opening, step in zip(openings, computation.equations(), strict=False)]

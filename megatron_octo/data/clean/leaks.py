r"""Planted leaks and near-misses, made from the questions of a benchmark: they measure what the decontamination finds.

A leak gives the question away: its words stand there in another dress (`verbatim`, `rewrapped`, `embedded`, `markdown`,
`html`, `latex`), its sentences in another order (`reordered`), half of it in a row (`half`, where that is 13 words), or
its words with other numbers (`numbers`: the wording, and with it the way to solve it, is what a benchmark of word
problems tests, so such a text counts as a leak). A near-miss does not: the same template with other numbers and other
names and things is another problem of its kind (`template`); a text may be about the same things (`topic`), quote up to
12 words (`quote`), use the phrases that all such problems share (`phrases`), or define a term as they all do
(`definition`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megatron_octo.data.clean.questions import Question
from megatron_octo.data.clean.words import words_of

_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?![\w])")
_NO_NAME = (
    "January|February|March|April|May|June|July|August|September|October|November|December|They|The|Each|How|What"
)
_PROPER = re.compile(rf"\b(?!{_NO_NAME}|\w+day\b)[A-Z][a-z]{{2,}}\b")
_SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z$\\])")
_SPREAD = 40

_LEAD = (
    "Here is one that came up in the study group last week.", "A reader sent this in.", "Warm-up for today:",
    "This one is from an old worksheet.", "Try it before you look at the solution below.",
)  # fmt: skip
_TAIL = (
    "We talked about it for a while before anybody wrote an equation.", "The trick is to write down what is known.",
    "It took most of the class ten minutes.", "Post your way of doing it in the comments.",
    "The solution is on the next page, so do not scroll yet.",
)  # fmt: skip
_FILLER = (
    "The library opens at nine and closes late on weekdays, which suits people who study after work.",
    "Some of the older notes are hard to read, and a few pages are missing, but the order is clear.",
    "A good habit is to check the units first and the size of the result second.",
    "Nobody expected the discussion to go on for so long, least of all the teacher.",
    "In the next section we look at a different kind of exercise and at common mistakes.",
)
_NAMES = (
    "Oduya", "Petrov", "Marisol", "Henrik", "Yuki", "Tamsin", "Bashir", "Leocadia", "Quentin", "Zuleika", "Ferran",
    "Ingrid", "Odalys", "Rafe", "Simone", "Viggo",
)  # fmt: skip
_THINGS = {
    "miles": "leagues", "dollars": "francs", "apples": "lanterns", "hours": "shifts", "minutes": "turns",
    "days": "seasons", "books": "scrolls", "cookies": "candles", "students": "sailors", "pages": "stanzas",
    "eggs": "pearls", "cars": "sledges", "friends": "rivals", "money": "silver", "week": "voyage", "children": "crew",
    "house": "harbour", "school": "shipyard", "bought": "traded", "sold": "pawned", "buy": "trade", "sell": "pawn",
    "train": "barge", "year": "century", "years": "centuries", "weeks": "voyages", "month": "reign", "feet": "fathoms",
    "pounds": "barrels", "class": "fleet", "dogs": "goats", "cats": "owls", "store": "depot", "game": "duel",
}  # fmt: skip
_PHRASES = (
    "The answer can be written in the form $\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. "
    "What is $m+n$?",
    "Express your answer as a common fraction in simplest form.",
    "Round your answer to the nearest whole number and show all of your work.",
    "Find the sum of all of the possible values, and enter your answer as a simplified fraction.",
    "How many different ways are there to do this if the order does not matter?",
    "Let $a$, $b$ and $c$ be positive real numbers such that the following holds.",
    "How much money does he have left at the end of the day, in dollars?",
)
_DEFINITIONS = (
    r"Let $\lfloor x \rfloor$ denote the greatest integer less than or equal to $x$. "
    r"For example, $\lfloor 3.1 \rfloor = 3$ and $\lfloor -1.4 \rfloor = -2$.",
    r"For every real number $x$, define $\lfloor x \rfloor$ to be equal to the greatest integer less than or equal to "
    r"$x$. (We call this the floor of $x$.)",
    "(An arithmetic sequence is a sequence in which each term after the first is obtained from the previous term by "
    "adding a constant. For example, $3,5,7,9$ are the first four terms of an arithmetic sequence.)",
    "A geometric sequence is a sequence in which each term after the first is obtained from the previous term by "
    "multiplying it by a constant.",
    r"The area can be written in the form $\frac{a\sqrt{b}}{c}$, where $a$, $b$ and $c$ are positive integers, $a$ and "
    r"$c$ are relatively prime, and $b$ is not divisible by the square of any prime. Find $a+b+c$.",
    "A permutation of a list of numbers is an ordered arrangement of the numbers in that list.",
    "A positive integer is called a palindrome if it reads the same forwards and backwards.",
)


@dataclass(frozen=True)
class Planted:
    """A document made from a question.

    Args:
        question: the question.
        kind: of leak or near-miss.
        leak: whether it gives the question away.
        text: of the document.
    """

    question: Question
    kind: str
    leak: bool
    text: str


def _verbatim(text: str, draw: random.Random) -> str:
    return f"Question: {text}\nAnswer: {draw.choice(_TAIL)}"


def _rewrapped(text: str, draw: random.Random) -> str:
    """Lines of another width, indented or quoted; long words are cut at the end of a line."""
    width, margin = draw.randint(16, 60), draw.choice(("", "    ", "> ", "\t", "// "))
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            if len(word) > 7 and word.isalpha() and word.islower() and draw.random() < 0.5:
                line, word = f"{line} {word[:4]}-", word[4:]
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join(margin + line for line in [*lines, line, draw.choice(_TAIL)])


def _embedded(text: str, draw: random.Random) -> str:
    """In the middle of prose, on one line with it."""
    before, after = " ".join(draw.sample(_FILLER, 2)), draw.choice(_FILLER)
    return f"{before} {draw.choice(_LEAD)} {' '.join(text.split())} {draw.choice(_TAIL)} {after}"


def _markdown(text: str, draw: random.Random) -> str:
    """Emphasis, other capitals, typographic quotes, HTML."""
    words = text.replace("'", "\u2019").split(" ")
    text = " ".join(f"**{word}**" if word.isalpha() and draw.random() < 0.2 else word for word in words)
    text = text.upper() if "\\" not in text and draw.random() < 0.2 else text
    return f"## Problem {draw.randint(1, 99)}\n\n{text.replace('. ', '.<br/> ')}\n\n{draw.choice(_TAIL)}"


_ENTITIES = {
    "&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&rsquo;", '"': "&quot;", "\u00d7": "&times;", "\u2264": "&le;",
    "\u2265": "&#8805;", "\u03c0": "&pi;", "\u00b0": "&deg;", "$": "&#x24;", "-": "&minus;", "\u00bd": "&frac12;",
}  # fmt: skip


def _html(text: str, draw: random.Random) -> str:
    """A paragraph as pages have it: entities instead of characters, and blanks that do not break."""
    text = "".join(_ENTITIES.get(character, character) for character in text)
    words = text.split(" ")
    glued = "".join(f"{'&nbsp;' if draw.random() < 0.5 else ' '}{word}" for word in words[1:])
    return f"<p>{words[0]}{glued}</p>\n<p>{draw.choice(_TAIL)}</p>"


_RESPELL: tuple[tuple[str, str], ...] = (
    (r"\\[dt]?frac(?![a-z])", r"\\dfrac"), (r"\\left(?![a-z])\s*", ""), (r"\\right(?![a-z])\s*", ""), (r"\\\[", "$$"),
    (r"\\\]", "$$"), (r"\\le(?:q)?(?![a-z])", "\u2264"), (r"\\ge(?:q)?(?![a-z])", "\u2265"),
    (r"\\pi(?![a-z])", "\u03c0"), (r"\\times(?![a-z])", "\u00d7"), (r"\\cdot(?![a-z])", "\u00b7"),
    (r"\\(?:text|mathrm)\{([^{}]*)\}", r"\\mbox{\1}"), (r"\\ldots(?![a-z])", "\u2026"),
    (r"(?<=\d),(?=\d{3}(?!\d))", "{,}"), (r"(?<=[\d}]) ?- ?(?=[\d\\])", " \u2212 "), (r"(?<![\d,}])\\[,;! ]", " "),
    (r"\^\{?2\}?(?!\d)", "\u00b2"), (r"(?<![\d/.,])1/2(?![\d/])", "\u00bd"),
)  # fmt: skip


def _latex(text: str, draw: random.Random) -> str:
    """The same formulas in another spelling; numbers of a text without formulas become formulas."""
    if "$" not in text and "\\" not in text:
        text = _NUMBER.sub(lambda found: f"\\({found[0].replace(',', chr(92) + ',')}\\)", text)
    for pattern, spelling in _RESPELL:
        text = re.sub(pattern, spelling, text)
    parts = re.split(r"(?<!\$)\$(?!\$)", text)
    if len(parts) % 2:
        text = "".join(part if not place % 2 else f"\\( {part} \\)" for place, part in enumerate(parts))
    return f"Problem. {text}\n\nSolution. {draw.choice(_TAIL)}"


def _reordered(text: str, draw: random.Random) -> str | None:
    """Its sentences in another order."""
    sentences = _SENTENCE.split(text.strip())
    if len(sentences) < 2:
        return None
    turned = [sentences[-1], *sentences[:-1]]
    return f"{draw.choice(_LEAD)} {' '.join(turned)} {draw.choice(_TAIL)}"


def _numbers(text: str, draw: random.Random) -> str | None:
    """All its numbers others."""
    changed = _NUMBER.sub(lambda found: str(int(found[0].replace(",", "")) + draw.randint(1, _SPREAD)), text)
    return None if changed == text else f"Question: {changed}\nAnswer: {draw.choice(_TAIL)}"


def _template(text: str, draw: random.Random) -> str | None:
    """Other numbers, other names, other things."""
    names = [name for name in dict.fromkeys(_PROPER.findall(text)) if re.search(rf"[a-z,;] {name}\b|{name}'", text)]
    things = [word for word in _THINGS if re.search(rf"\b{word}\b", text)]
    if not names or len(things) < 2 or _numbers(text, random.Random(0)) is None:
        return None
    for name, other in zip(names, draw.sample(_NAMES, min(len(names), len(_NAMES))), strict=False):
        text = re.sub(rf"\b{name}\b", other, text)
    for word in things:
        text = re.sub(rf"\b{word}\b", _THINGS[word], text)
    return _numbers(text, draw)


def _topic(text: str, draw: random.Random) -> str | None:
    """A text about the same things, in words of its own."""
    words = list(dict.fromkeys(word.lower() for word in re.findall(r"[A-Za-z]{5,}", text)))
    if len(words) < 4:
        return None
    draw.shuffle(words)
    pairs = zip(words[::2], words[1::2], strict=False)
    listed = [f"A word about {one} and {other}: {draw.choice(_FILLER)}" for one, other in pairs]
    return "\n".join(listed[:6])


def _quote(text: str, draw: random.Random, longest: int) -> str | None:
    """A few words in a row of it, never all of it."""
    words = text.split()
    first = draw.randrange(max(1, len(words) - longest + 1))
    words = words[first : first + longest] if first else words[: min(longest, len(words) - 1)]
    while words and len(words_of(" ".join(words))) > longest:
        words.pop()
    if len(words) < 4 or len(words_of(" ".join(words))) == len(words_of(text)):
        return None
    return f"{draw.choice(_FILLER)} \u201c{' '.join(words)}\u201d \u2013 {draw.choice(_FILLER)}"


def _half(text: str, draw: random.Random, longest: int) -> str | None:
    """Half of its words in a row, in the middle of prose, where that is more than a quotation that gives nothing away.

    What is planted are pieces between blanks, as few as hold half of the words: a formula is many words and one piece.
    """
    pieces, half = text.split(), -(-len(words_of(text)) // 2)
    if half <= longest:
        return None
    first = draw.randrange(len(pieces))
    counts = [len(words_of(piece)) for piece in pieces]
    while sum(counts[first:]) < half:
        first -= 1
    end = first
    while sum(counts[first:end]) < half:
        end += 1
    return _embedded(" ".join(pieces[first:end]), draw)


def _definition(text: str, draw: random.Random) -> str:
    """Another problem that explains a term in the words that are usual for it."""
    return f"{draw.choice(_FILLER)} {' '.join(draw.sample(_DEFINITIONS, 2))} {draw.choice(_PHRASES)}"


def _phrases(text: str, draw: random.Random) -> str:
    """What problems of its kind have in common."""
    return f"{draw.choice(_FILLER)} {' '.join(draw.sample(_PHRASES, 3))}"


Maker = Callable[[str, random.Random], str | None]
LEAKS: dict[str, Maker] = {
    "verbatim": _verbatim, "rewrapped": _rewrapped, "embedded": _embedded, "markdown": _markdown, "html": _html,
    "latex": _latex, "numbers": _numbers, "reordered": _reordered,
}  # fmt: skip
NEAR_MISSES: dict[str, Maker] = {
    "template": _template, "topic": _topic, "phrases": _phrases, "definition": _definition,
}  # fmt: skip
QUOTATIONS: dict[str, Callable[[str, random.Random, int], str | None]] = {"half": _half, "quote": _quote}
"""A leak and a near-miss that depend on the number of words that are compared."""


def is_leak(kind: str) -> bool:
    """Whether what is planted under a name gives its question away."""
    return kind in LEAKS or kind == "half"


def plant(questions: list[Question], seed: int, quoted: int = 12) -> Iterator[Planted]:
    """Make leaks and near-misses of every kind that a question allows, the same ones for the same seed.

    Args:
        questions: to make them from.
        seed: of all draws.
        quoted: words in the longest quotation that gives nothing away.
    """
    quotations = {kind: partial(maker, longest=quoted) for kind, maker in QUOTATIONS.items()}
    for question in questions:
        for kind, maker in {**LEAKS, **NEAR_MISSES, **quotations}.items():
            text = maker(question.text, random.Random(f"{seed}/{kind}/{question.id}"))
            if text is not None:
                yield Planted(question, kind, is_leak(kind), text)

"""An index of the n-grams of questions, and which question a document gives away.

A question of n words or more is given away by a document that holds a share of its n-grams (`coverage`), or a long
quotation: a share of its words in a row (`quoted`), or so many that they are no accident (`quoted_words`); or a larger
share of its n-grams with all numbers taken as equal (`changed_numbers`; for questions with at least 20 other words,
since "the greatest common divisor of 12 and 18" is an exercise of its own). n-grams that several different questions
have are common phrases: they count for nothing, and a quotation ends where they begin. A stem that so many parts of
one problem share is such a phrase as well; of these a document must have more than the stem.

A shorter question is given away by its whole run of words with the same signs `+ - = < >` between them. Where it has
fewer than `short` words it must also stand as a sentence or a line of its own, or between labels such as `Q:` and `A:`;
as a part of a longer sentence such words are found by chance.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_octo.config.clean import Decontaminate
from megatron_octo.data.clean.questions import Question
from megatron_octo.data.clean.words import Batch, Words, ngrams, words_of

Kind = Literal["same", "numbers", "short"]

_PREFIX = 6  # words by which a short question is found before it is compared whole
_OTHER_WORDS = 20
_ANY = np.uint64(0)
_SIGNS = re.compile(rb"[^-+=<>]+")
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million"
)
_LABELS = rb"question|problem|exercise|example|task|prompt|user|human|q"
_BEFORE = re.compile(rb"[\n.?!:;][\W_]*+(?:" + _LABELS + rb")?[\W_]*+\d{0,4}[\W_]*+\Z")
_AFTER = re.compile(rb"[^\w.?!\n]*?(?:[.?!\n]|\$\$|\Z|(?:answer|solution|assistant|response|proof|a)\s*:)")


@dataclass(frozen=True)
class Match:
    """A question in a document.

    Args:
        question: its number in the index.
        kind: `same`, its words as they are; `numbers`, with other numbers; `short`, all of a short question.
        coverage: share of its n-grams that the document holds.
        first: number of the first word of the longest run that agrees.
        words: how many words in a row agree there.
    """

    question: int
    kind: Kind
    coverage: float
    first: int
    words: int


class _Grams:
    """Hashes, each with the questions it belongs to: sorted, behind a table of bits that most lookups end at.

    Args:
        values: a hash for each pair of hash and question, uint64 [p]; a pair may be there twice.
        owners: the question of each pair, int64 [p].
    """

    def __init__(self, values: np.ndarray, owners: np.ndarray) -> None:
        order = np.lexsort((owners, values))
        values, owners = values[order], owners[order]
        new = np.ones(len(values), bool)
        new[1:] = (values[1:] != values[:-1]) | (owners[1:] != owners[:-1])
        self._owners = owners[new].astype(np.uint32)
        self.hashes, first, self.counts = np.unique(values[new], return_index=True, return_counts=True)
        self._first = np.append(first, len(self._owners))
        self._mask = np.uint64((1 << max(16, (16 * len(self.hashes)).bit_length())) - 1)
        self._bits = np.zeros(int(self._mask) + 1, bool)
        self._bits[self.hashes & self._mask] = True

    @property
    def bytes(self) -> int:
        return sum(table.nbytes for table in (self.hashes, self._owners, self._first, self.counts, self._bits))

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each hash with each of its questions, once, and how many questions have the hash."""
        return np.repeat(self.hashes, self.counts), self._owners, np.repeat(self.counts, self.counts)

    def places(self, values: np.ndarray) -> np.ndarray:
        """Which of some hashes are here; int64 [found]."""
        return self.find(values)[0]

    def find(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of some hashes are here, and their rows in the table; two of int64 [found]."""
        likely = np.flatnonzero(self._bits[values & self._mask])
        if not len(likely):
            return likely, likely
        rows = np.searchsorted(self.hashes, values[likely])
        rows[rows == len(self.hashes)] = 0
        here = self.hashes[rows] == values[likely]
        return likely[here], rows[here]

    def owned(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The hashes that are here, each with each of its questions: places, rows and questions; int64 [pairs]."""
        places, rows = self.find(values)
        counts = self.counts[rows]
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return (
            np.repeat(places, counts),
            np.repeat(rows, counts),
            self._owners[np.repeat(self._first[rows], counts) + steps],
        )


class _Shares:
    """Which share of each question's n-grams a document holds; common phrases are no evidence, where there is other."""

    def __init__(self, grams: _Grams, questions: int, phrase: int) -> None:
        values, owners, counts = grams.pairs
        alone = np.bincount(owners[counts < phrase], minlength=questions)
        evidence = (counts < phrase) | (alone[owners] == 0)
        self.grams = _Grams(values[evidence], owners[evidence])
        self._totals = np.bincount(owners[evidence], minlength=questions)

    def of(self, values: np.ndarray) -> list[tuple[int, float, int, int]]:
        """For each question that has any of a document's n-grams: its number, the share of its n-grams, and where the
        longest run of them begins and how many it has."""
        places, rows, owners = self.grams.owned(values)
        found = []
        for number in np.unique(owners).tolist():
            own = owners == number
            share = len(np.unique(rows[own])) / int(self._totals[number])
            found.append((number, share, *_longest_run(places[own])))
        return found


def _longest_run(places: np.ndarray) -> tuple[int, int]:
    """Where the longest run of neighbours among ascending places begins, and how many they are."""
    begins = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    sizes = np.diff(begins, append=len(places))
    longest = int(sizes.argmax())
    return int(places[begins[longest]]), int(sizes[longest])


class LeakIndex:
    """Finds questions in documents.

    Args:
        questions: what no document may give away; equal ones count once.
        config: what counts as that.
    """

    def __init__(self, questions: Sequence[Question], config: Decontaminate) -> None:
        self._config, self._n = config, config.ngram
        numbers = words_of(_NUMBER_WORDS).hashes
        self._numbers = _Grams(numbers, np.zeros(len(numbers), np.int64))
        words = {}
        for question in questions:
            found = words_of(question.text)
            words.setdefault(found.hashes.tobytes(), (question, found))
        self.questions = [question for question, _ in words.values()]
        self._words = [found for _, found in words.values()]
        long = {number: found for number, found in enumerate(self._words) if len(found) >= self._n}
        masked = {number: self._alike(found) for number, found in long.items()}
        varied = {number: values for number, values in masked.items() if (values != _ANY).sum() >= _OTHER_WORDS}
        same = self._grams({number: found.hashes for number, found in long.items()})
        self._any = self._grams(masked)
        self._same = _Shares(same, len(self.questions), config.phrase)
        self._varied = _Shares(self._grams(varied), len(self.questions), config.phrase)
        self._short = self._prefixes()

    @property
    def bytes(self) -> int:
        """Memory of its tables."""
        tables = [self._same.grams, self._any, self._varied.grams, *self._short.values()]
        return sum(table.bytes for table in tables)

    def _grams(self, hashes: dict[int, np.ndarray]) -> _Grams:
        grams = [ngrams(values, self._n) for values in hashes.values()]
        owners = np.repeat(np.array(list(hashes), np.int64), [len(values) for values in grams])
        return _Grams(np.concatenate([np.empty(0, np.uint64), *grams]), owners)

    def _prefixes(self) -> dict[int, _Grams]:
        """Short questions by their beginnings, by the length of these."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, words in enumerate(self._words):
            if 0 < len(words) < self._n:
                size = min(_PREFIX, len(words))
                found[size].append((int(ngrams(words.hashes[:size], size)[0]), number))
        return {
            size: _Grams(np.array([value for value, _ in several], np.uint64), np.array([n for _, n in several]))
            for size, several in sorted(found.items())
        }

    def _alike(self, words: Words) -> np.ndarray:
        """Hashes of the words with every number the same; uint64 [w]."""
        hashes = np.where(words.digits, _ANY, words.hashes)
        hashes[self._numbers.places(words.hashes)] = _ANY
        return hashes

    def size(self, question: int) -> int:
        """How many words a question has."""
        return len(self._words[question])

    def suspects(self, batch: Batch) -> list[int]:
        """Which texts of a batch need a closer look; all others touch no question."""
        words = batch.words
        places = [self._any.places(ngrams(self._alike(words), self._n))]
        places += [table.places(ngrams(words.hashes, size)) for size, table in self._short.items()]
        return batch.text_of(np.concatenate(places)).tolist()

    def touched(self, words: Words) -> list[Match]:
        """Every question a document has something of, the largest share first; not all of it gives one away.

        Args:
            words: of the document.
        """
        found = self._short_ones(words)
        masked = ngrams(self._alike(words), self._n)
        if len(self._any.places(masked)):  # which it has wherever the same words stand, with the same numbers or not
            shares: list[tuple[Kind, list[tuple[int, float, int, int]]]] = [
                ("same", self._same.of(ngrams(words.hashes, self._n)))
            ]
            if self._config.changed_numbers is not None:
                shares.append(("numbers", self._varied.of(masked)))
            for kind, several in shares:
                found += [
                    Match(number, kind, share, first, count + self._n - 1) for number, share, first, count in several
                ]
        return sorted(found, key=lambda match: (-match.coverage, match.kind != "same", match.question))

    def leak(self, words: Words) -> Match | None:
        """The question a document gives away most of; None for a clean document."""
        return next((match for match in self.touched(words) if self.is_leak(match)), None)

    def is_leak(self, match: Match) -> bool:
        """Whether an agreement is enough to give the question away."""
        if match.kind == "numbers":
            return match.coverage >= (self._config.changed_numbers or 1.0)
        if match.kind == "short" or match.coverage >= self._config.coverage:
            return True
        share, question = self._config.quoted, self._words[match.question]
        return share is not None and match.words >= min(share * len(question), self._config.quoted_words)

    def _short_ones(self, words: Words) -> list[Match]:
        found = {}
        for size, prefixes in self._short.items():
            places, _, owners = prefixes.owned(ngrams(words.hashes, size))
            for place, number in zip(places.tolist(), owners.tolist(), strict=True):
                if number not in found and self._is_whole(words, place, self._words[number]):
                    found[number] = Match(number, "short", 1.0, place, len(self._words[number]))
        return list(found.values())

    def _is_whole(self, words: Words, place: int, question: Words) -> bool:
        end = place + len(question)
        if not np.array_equal(words.hashes[place:end], question.hashes):
            return False
        if _signs(words, place, end) != _signs(question, 0, len(question)):
            return False
        if len(question) >= self._config.short:
            return True
        first, last = int(words.starts[place]), int(words.ends[end - 1])
        before = (b"\n" + words.text)[max(0, first - 60) : first + 1]
        return bool(_BEFORE.search(before)) and bool(_AFTER.match(words.text, last))


def _signs(words: Words, first: int, end: int) -> bytes:
    return _SIGNS.sub(b"", words.text[words.starts[first] : words.ends[end - 1]])

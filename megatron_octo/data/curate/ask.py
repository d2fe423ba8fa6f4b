"""Many questions at the same time, shard after shard; each answer is in its log before it counts."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.config.curate import Endpoint
from megatron_octo.data.curate.answers import Answer, Answers, Log
from megatron_octo.data.curate.client import CHARACTERS_PER_TOKEN, Client
from megatron_octo.data.curate.prompts import Asked
from megatron_octo.errors import OctoError
from megatron_octo.progress import Progress
from megatron_octo.units import format_duration, format_tokens

_TOGETHER, _AT_ONCE = 64, 0.1  # documents that are read, or seconds of reading, before they are asked about

Pulse = Callable[[], None]


@dataclass(frozen=True)
class Pile:
    """The documents of one shard that a model is asked about.

    Args:
        log: file of the answers.
        texts: opens the documents: ids and texts, the same ones every time. They are read in a thread of their own;
            what is called between two documents, also those left out, ends that where nobody waits for them any more.
        finish: called once all have an answer, in a thread of its own.
    """

    log: Path
    texts: Callable[[Pulse], Iterable[tuple[str, str]]]
    finish: Callable[[], Any]


@dataclass(frozen=True)
class Forecast:
    """What questions will cost, about, as far as that can be known before the first answer.

    Args:
        documents: how many.
        tokens_in: of all prompts.
        tokens_out: of all answers.
    """

    documents: int
    tokens_in: int
    tokens_out: int

    @classmethod
    def of(cls, asked: Asked, documents: int, characters: int, answer: float) -> Forecast:
        """A forecast.

        Args:
            asked: prompt and settings.
            documents: to ask about.
            characters: of all of them.
            answer: characters of an answer to one document, about.
        """
        sent = min(characters, documents * asked.limit) + documents * len(asked.prompt)
        most = documents * asked.settings["max_tokens"]
        return cls(documents, sent // CHARACTERS_PER_TOKEN, min(most, int(documents * answer) // CHARACTERS_PER_TOKEN))

    def words(self, endpoint: Endpoint) -> str:
        """The forecast for a person, with the time that the limits of an endpoint alone take."""
        minutes = [
            amount / limit
            for amount, limit in (
                (self.documents, endpoint.requests_per_minute),
                (self.tokens_in + self.tokens_out, endpoint.tokens_per_minute),
            )
            if limit
        ]
        limits = f", {format_duration(60 * max(minutes))} or more at the limits per minute" if minutes else ""
        tokens = f"about {format_tokens(self.tokens_in)} tokens in and {format_tokens(self.tokens_out)} out"
        return f"{self.documents} documents for {endpoint.model}: {tokens}{limits}; answers already kept cost nothing"


def ask_all(
    step: str, piles: Sequence[Pile], asked: Asked, endpoint: Endpoint, forecast: Forecast,
    heard: Callable[[Answer], None] = lambda answer: None,
) -> None:  # fmt: skip
    """Ask about all documents that have no answer yet.

    Args:
        step: what is done, for the progress bar.
        piles: shards that are not finished.
        asked: prompt and settings.
        endpoint: the server.
        forecast: of these piles.
        heard: called with each new answer once it is in its log; what it raises ends the asking.

    Raises:
        EnvironmentProblem: the server is down, does not take the key, or does not know the model. Answers are kept.
        ConfigError: there is no key where there should be one.
    """
    client = Client(endpoint, asked)
    print(f"{step}: {forecast.words(endpoint)}", file=sys.stderr, flush=True)
    with Progress(step, forecast.documents, "documents", lines=True) as progress:
        try:
            asyncio.run(_Asking(piles, asked, endpoint, client, progress, heard).run())
        except BaseExceptionGroup as group:
            raise _first(group) from None


def _first(group: BaseExceptionGroup) -> BaseException:
    """One error of several that came together: one for the user rather than a defect that followed from it."""
    errors: list[BaseException] = []
    for error in group.exceptions:
        errors.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in errors if isinstance(error, OctoError)), errors[0])


class _Open:
    """A pile that is worked on."""

    def __init__(self, pile: Pile) -> None:
        self.pile, self.log = pile, Log(pile.log)
        self.log.__enter__()
        self.known = self.log.answered()
        self.waiting, self.whole = 0, False

    def take(self, key: str) -> None:
        """Wait for the answer to a question."""
        self.known.add(key)
        self.waiting += 1

    def finish(self) -> None:
        """All have an answer."""
        self.log.close()
        self.pile.finish()


class _NobodyWaits(Exception):
    """Reading is for nothing, for asking has ended."""


class _Asking:
    """One run over piles: a producer of questions, and as many askers as requests may be under way."""

    def __init__(
        self, piles: Sequence[Pile], asked: Asked, endpoint: Endpoint, client: Client, progress: Progress,
        heard: Callable[[Answer], None],
    ) -> None:  # fmt: skip
        self._piles, self._asked, self._count = piles, asked, endpoint.concurrency
        self._client, self._progress, self._heard = client, progress, heard
        self._queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=endpoint.concurrency)
        self._open: set[_Open] = set()
        self._answers = Answers(path for folder in {pile.log.parent for pile in piles} for path in _logs(folder))
        self._under_way: dict[str, list[tuple[_Open, str]]] = {}
        self._over = False
        self._began, self._new, self._tokens = time.monotonic(), 0, 0

    async def run(self) -> None:
        """Ask everything, and finish every pile."""
        try:
            async with self._client, asyncio.TaskGroup() as self._group:
                self._group.create_task(self._produce())
                for _ in range(self._count):
                    self._group.create_task(self._consume())
        finally:
            self._over = True
            for opened in self._open:
                opened.log.close()

    async def _produce(self) -> None:
        async for question in self._questions():
            await self._queue.put(question)
        for _ in range(self._count):
            await self._queue.put(None)

    async def _questions(self) -> AsyncIterator[tuple[str, str]]:
        """Keys and messages of what has no answer yet, each once, in whatever shards it stands."""
        for pile in self._piles:
            opened = await asyncio.to_thread(_Open, pile)
            self._open.add(opened)
            async for document, text in self._read(pile):
                message = self._asked.message(text)
                key = self._asked.key(message)
                if key in opened.known:
                    self._progress.advance(1)
                elif (waiting := self._under_way.get(key)) is not None:
                    opened.take(key)
                    waiting.append((opened, document))
                elif (answer := self._answers.find(key)) is not None:
                    opened.known.add(key)
                    opened.log.add(key, document, answer)
                    self._progress.advance(1)
                else:
                    opened.take(key)
                    self._under_way[key] = [(opened, document)]
                    yield key, message
            opened.whole = True
            self._finish(opened)

    async def _read(self, pile: Pile) -> AsyncIterator[tuple[str, str]]:
        """The documents of a pile; while they are read, which may take long, others are asked about."""
        documents = iter(pile.texts(self._pulse))
        while some := await asyncio.to_thread(_some, documents):
            for document in some:
                yield document

    def _pulse(self) -> None:
        if self._over:
            raise _NobodyWaits

    async def _consume(self) -> None:
        while (question := await self._queue.get()) is not None:
            key, message = question
            answer = await self._client.ask(message)
            waiting = self._under_way.pop(key)
            for opened, document in waiting:
                place = opened.log.add(key, document, answer)
                if answer.failure is None:
                    self._answers.add(key, opened.pile.log, place)
                opened.waiting -= 1
                self._finish(opened)
            self._tell(answer, len(waiting))
            self._heard(answer)

    def _tell(self, answer: Answer, documents: int) -> None:
        self._new += 1
        self._tokens += sum(answer.tokens)
        spent = max(1e-9, time.monotonic() - self._began)
        facts: dict[str, Any] = {"docs/s": self._new / spent, "tokens_per_second": self._tokens / spent}
        if self._client.again:
            facts["repeated"] = self._client.again
        self._progress.advance(documents, **facts)

    def _finish(self, opened: _Open) -> None:
        if not opened.whole or opened.waiting or opened not in self._open:
            return
        self._open.remove(opened)
        self._group.create_task(asyncio.to_thread(opened.finish))


def _logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _some(documents: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    began, found = time.monotonic(), []
    for document in documents:
        found.append(document)
        if len(found) == _TOGETHER or time.monotonic() - began > _AT_ONCE:
            break
    return found

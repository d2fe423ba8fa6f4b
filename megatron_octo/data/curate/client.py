"""One question to a server that speaks OpenAI's chat completions, asked until it is answered or clearly will not be."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from types import TracebackType
from typing import Any

from megatron_octo.config.curate import Endpoint
from megatron_octo.data.curate.answers import Answer
from megatron_octo.data.curate.pace import Breaker, Pace
from megatron_octo.data.curate.prompts import Asked
from megatron_octo.errors import ConfigError, EnvironmentProblem

CHARACTERS_PER_TOKEN = 4
"""Of English text, about; for estimates before the server has counted."""

_KEY_REFUSED = (401, 403)
_NOT_THERE = (301, 302, 303, 307, 308, 404, 405)
_DOCUMENT_REFUSED = (400, 413, 422)
_SHOWN = 300  # characters of a server's words


class _Later(Exception):
    """A failure that may pass; `wait` is how long the server wants to be left alone, where it says so."""

    def __init__(self, reason: str, wait: float | None = None, patience: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.wait, self.patience = reason, wait, patience


class Client:
    """Asks questions of one kind; use as an asynchronous context manager.

    Args:
        endpoint: the server. Its key is read from the environment here, and appears nowhere else.
        asked: prompt and settings.

    Raises:
        ConfigError: the variable with the key is not set, or holds no key.
    """

    def __init__(self, endpoint: Endpoint, asked: Asked) -> None:
        self._endpoint, self._asked = endpoint, asked
        self._url = endpoint.url.rstrip("/") + "/chat/completions"
        self._key = key_of(endpoint)
        self._requests, self._tokens = Pace(endpoint.requests_per_minute), Pace(endpoint.tokens_per_minute)
        self._breaker = Breaker(endpoint)
        self._refused, self._accepted = 0, False
        self.again = 0
        """Requests so far that had to be repeated."""

    async def __aenter__(self) -> Client:
        import aiohttp

        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._endpoint.timeout_seconds),
            connector=aiohttp.TCPConnector(limit=self._endpoint.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, message: str) -> Answer:
        """Ask one question.

        Returns:
            The answer; or why there is none for this document.

        Raises:
            EnvironmentProblem: the server is down, does not take the key, or does not know the model.
        """
        body = json.dumps(self._asked.request(message)).encode()
        attempt = repeated = 0
        while True:
            trying = await self._breaker.enter()
            expected = len(message) / CHARACTERS_PER_TOKEN
            await self._requests.take()
            await self._tokens.take(expected)
            try:
                answer = await self._once(body)
            except _Later as later:
                paused = self._breaker.paused
                self._note(later, trying)
                if not paused and not later.patience:
                    attempt += 1
                if attempt >= self._endpoint.attempts:
                    return Answer(failure=later.reason)
                self.again += 1
                await asyncio.sleep(self._wait(repeated, later))
                repeated += 1
            else:
                self._breaker.answered()
                self._tokens.correct(sum(answer.tokens) - expected)
                self._refuse_all_refused(answer)
                return answer

    def _note(self, later: _Later, trying: bool) -> None:
        if later.patience:
            self._breaker.asked_to_wait(later.wait or 0.0, trying)
        else:
            self._breaker.failed(later.reason, trying)

    def _wait(self, repeated: int, later: _Later) -> float:
        """Seconds, more with each repetition, and never the same for two requests: they must not come back together."""
        first, longest = self._endpoint.first_wait_seconds, self._endpoint.longest_wait_seconds
        if later.wait is not None:
            return later.wait + random.uniform(0, min(first, later.wait))
        return min(longest, first * 2.0 ** min(repeated, 30)) * random.uniform(0.5, 1.0)

    async def _once(self, body: bytes) -> Answer:
        import aiohttp

        try:
            async with self._session.post(
                self._url, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False
            ) as response:
                content = await response.read()
                status, after = response.status, response.headers.get("Retry-After")
        except TimeoutError:
            raise _Later("time-out") from None
        except aiohttp.ClientError as error:
            raise _Later(f"no connection ({type(error).__name__})") from None
        if status == 200:
            return answer_of(content)
        return self._refusal(status, self._words(content), seconds_of(after))

    def _refusal(self, status: int, words: str, wait: float | None) -> Answer:
        said = f"{self._url} answers {status}" + (f": {words}" if words else "")
        if status in _KEY_REFUSED:
            variable = self._endpoint.key_variable
            fix = f"set {variable} to a valid key" if variable else "name the variable that holds one as key_variable"
            raise EnvironmentProblem(said, "the server does not take the key" if variable else "it wants a key", fix)
        if status in _NOT_THERE:
            raise EnvironmentProblem(
                said, "there is no such address or no such model", "mend endpoint.url or its model"
            )
        if status in _DOCUMENT_REFUSED:
            return Answer(error=f"HTTP {status}: {words}" if words else f"HTTP {status}")
        if status == 429 and "insufficient_quota" in words:
            raise EnvironmentProblem(said, "the account's quota is used up", "the same command goes on from here")
        if status == 429:
            raise _Later("HTTP 429", wait, patience=True)
        if status == 408 or status >= 500:
            raise _Later(f"HTTP {status}", wait)
        raise EnvironmentProblem(said, "nothing is known about such an answer", "look at the server's log")

    def _words(self, content: bytes) -> str:
        """What the server says of an error, on one line, briefly, and never with the key it was given."""
        text = content.decode("utf-8", "replace")
        try:
            told = json.loads(text)
            error = told.get("error", told) if isinstance(told, dict) else told
            text = str(error.get("message") or error) if isinstance(error, dict) else str(error)
            text += f" ({error['code']})" if isinstance(error, dict) and isinstance(error.get("code"), str) else ""
        except ValueError:
            pass
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_SHOWN]

    def _refuse_all_refused(self, answer: Answer) -> None:
        """Stop where the server takes no document at all: then it is not the documents."""
        if answer.error is None or not answer.error.startswith("HTTP"):
            self._accepted = True
        self._refused += 1
        if not self._accepted and self._refused >= self._endpoint.failures:
            raise EnvironmentProblem(
                f"{self._url} refuses every document: {answer.error}",
                "it may not know a setting, or not take prompts of this length",
                "mend the settings of the question",
            )


def key_of(endpoint: Endpoint) -> str | None:
    """The key, from the environment variable that the endpoint names; None where it names none.

    Raises:
        ConfigError: the variable is not set, or holds what no key can be.
    """
    if endpoint.key_variable is None:
        return None
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"environment variable {endpoint.key_variable} {'holds no key' if key else 'is not set'}",
            "key_variable names it as the place of the server's key",
            f"export {endpoint.key_variable}=..., or leave key_variable out for a server without one",
        )
    return key


def answer_of(content: bytes) -> Answer:
    """The answer in the body of a successful response.

    Raises:
        _Later: it is not what it should be.
    """
    try:
        told: Any = json.loads(content)
        choice = told["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        refusal = choice["message"].get("refusal")
        usage = told.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        if isinstance(text, str):
            text.encode()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Later("garbage instead of an answer") from None
    if isinstance(refusal, str) and refusal.strip():
        return Answer(error="refusal", finish=finish, tokens=tokens)
    if finish == "content_filter":
        return Answer(error="content filter", finish=finish, tokens=tokens)
    if not isinstance(text, str) or not text.strip():
        return Answer(error="empty answer", finish=finish, tokens=tokens)
    return Answer(text=without_thinking(text), finish=finish, tokens=tokens)


def without_thinking(text: str) -> str:
    """An answer without the thinking that a reasoning model puts before it."""
    thinking, closed, rest = text.partition("</think>")
    return rest.lstrip() if closed and thinking.lstrip().startswith("<think>") else text


def seconds_of(after: str | None) -> float | None:
    """What `Retry-After` says, a number of seconds or a date; None where it says nothing that makes sense."""
    if after is None:
        return None
    try:
        seconds = float(after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < 1e6 else None

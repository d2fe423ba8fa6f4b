"""How fast requests may go: limits per minute, pauses a server asks for, and an end when nobody answers."""

from __future__ import annotations

import asyncio
import sys
import time

from megatron_octo.config.curate import Endpoint
from megatron_octo.errors import EnvironmentProblem


class Pace:
    """So much a minute, spread evenly; None for no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60.0 / per_minute if per_minute else 0.0
        self._free = 0.0

    async def take(self, amount: float = 1) -> None:
        """Wait until an amount may go."""
        if not self._seconds:
            return
        start = max(time.monotonic(), self._free)
        self._free = start + amount * self._seconds
        await asyncio.sleep(start - time.monotonic())

    def correct(self, amount: float) -> None:
        """Say that a past amount was larger than it was taken for, or smaller."""
        self._free += amount * self._seconds


class Breaker:
    """Keeps requests from a server that does not answer.

    After some failures in a row all requests pause; then a single one tries, again and again with a pause between,
    until one succeeds or too many have failed: a single time where the server has never answered. A server that asks
    for patience is given it, up to a limit.

    Args:
        endpoint: its limits.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._row = self._trials = 0
        self.paused = False
        self._trying = False
        self._until, self._answered = 0.0, time.monotonic()
        self._ever = False

    async def enter(self) -> bool:
        """Wait until a request may be sent; returns whether it is the single one that tries."""
        while True:
            wait = self._until - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            elif not self.paused:
                return False
            elif not self._trying:
                self._trying = True
                return True
            else:
                await asyncio.sleep(min(0.5, self._endpoint.pause_seconds))

    def answered(self) -> None:
        """Note that the server answered as it should."""
        self._ever = True
        self._row = self._trials = 0
        self.paused = self._trying = False
        self._answered = time.monotonic()

    def asked_to_wait(self, seconds: float, trying: bool) -> None:
        """Note that the server lives and wants fewer requests.

        Raises:
            EnvironmentProblem: it has said nothing else for too long.
        """
        self._row = self._trials = 0
        self.paused = False
        if trying:
            self._trying = False
        now = time.monotonic()
        self._until = max(self._until, now + seconds)
        silence = self._until - self._answered
        if silence > self._endpoint.patience_seconds:
            raise EnvironmentProblem(
                f"{self._endpoint.url} answers only that it wants to wait, {silence:.0f} s in all (HTTP 429)",
                "it limits requests or tokens, or the account's quota is used up",
                "set requests_per_minute and tokens_per_minute to what it grants; the same command goes on from here",
            )

    def failed(self, reason: str, trying: bool) -> None:
        """Note a request that came to nothing.

        Raises:
            EnvironmentProblem: the server is down.
        """
        self._row += 1
        if trying:
            self._trying = False
            self._trials += 1
        elif self.paused or self._row < self._endpoint.failures:
            return
        if self._trials >= (self._endpoint.trials if self._ever else 1):
            raise EnvironmentProblem(
                f"{self._endpoint.url} does not answer: {self._row} requests in a row failed, the last with {reason}",
                "answers so far are kept",
                "start the server or mend the URL; the same command goes on from here",
            )
        self.paused = True
        seconds = self._endpoint.pause_seconds
        self._until = time.monotonic() + seconds
        print(f"{self._endpoint.url} does not answer ({reason}): waiting {seconds:g} s", file=sys.stderr, flush=True)

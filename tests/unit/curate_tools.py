"""A server that speaks chat completions with known answers and known failures, and corpora to curate."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

DOCUMENT = re.compile(r"document (\d+) ")


@dataclass
class Reply:
    """What to answer: a text, or a status with a raw body; `cut` closes the connection without a word."""

    text: str | None = None
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finish: str = "stop"
    cut: bool = False


@dataclass
class Request:
    document: int
    message: str
    body: dict[str, Any]
    headers: dict[str, str]
    time: float
    path: str


class Server:
    """What was asked, and how often about each document; `answer(request, times)` decides, from `times` = 1."""

    def __init__(self, answer: Callable[[Request, int], Reply]) -> None:
        self.answer, self.requests = answer, []
        self.under_way = self.most = 0
        self._times: Counter[int] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def times(self, number: int) -> int:
        return self._times[number]

    def take(self, request: Request) -> Reply:
        self.requests.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self._times[request.document] += 1
        return self.answer(request, self._times[request.document])


@contextmanager
def serving(answer: Callable[[Request, int], Reply]) -> Iterator[Server]:
    """A server in a thread of its own."""
    server, loop = Server(answer), asyncio.new_event_loop()

    async def handle(asked: web.Request) -> web.Response:
        body = json.loads(await asked.read())
        message = body["messages"][0]["content"]
        found = DOCUMENT.search(message)
        number = int(found[1]) if found else -1
        request = Request(number, message, body, dict(asked.headers), time.monotonic(), asked.path)
        reply = server.take(request)
        await asyncio.sleep(reply.seconds)
        server.under_way -= 1
        if reply.cut:
            asked.transport.close()
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(_body(reply, message)).encode()
        return web.Response(body=content, status=reply.status, headers=reply.headers)

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.port = runner.addresses[0][1]
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _body(reply: Reply, message: str) -> Any:
    if reply.body is not None:
        return reply.body
    if reply.status != 200:
        return {"error": {"message": f"status {reply.status}"}}
    usage = {"prompt_tokens": len(message) // 4, "completion_tokens": len(reply.text or "") // 4}
    choice = {"message": {"role": "assistant", "content": reply.text}, "finish_reason": reply.finish}
    return {"choices": [choice], "usage": usage}


def good(number: int) -> bool:
    """Whether a document is about mathematics."""
    return random.Random(number).random() < 0.4


def text_of(number: int) -> str:
    """A document whose words tell what it is about."""
    draw = random.Random(number)
    words = ["theorem", "proof", "integral", "equation", "lemma", "angle"] if good(number) else [
        "shipping", "discount", "cart", "login", "weather", "football"]  # fmt: skip
    common = [f"common{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    other = draw.choices(["shipping", "discount", "theorem", "proof", "angle", "cart"], k=3)
    chosen = draw.choices(common, k=30) + draw.choices(words, k=3) + other
    draw.shuffle(chosen)
    return f"document {number} " + " ".join(chosen)


def judged(request: Request, times: int = 1) -> Reply:
    """The judge's answer: good documents get 3, 4 or 5."""
    number = request.document
    score = number % 3 + (3 if good(number) else 0)
    return Reply(f"It shows some reasoning.\nFinal score: {score}")


def refined(request: Request, times: int = 1) -> Reply:
    """A refined document: the same words, in capitals."""
    document = request.message.split("---\n")[1].strip()
    return Reply(document.upper())


def either(request: Request, times: int = 1) -> Reply:
    return judged(request) if "Final score" in request.message else refined(request)


def write_corpus(folder: Path, documents: int) -> None:
    """Two shards, one of lines and one of rows, with years 2014-2016, two records without one, one bad line."""
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"text": text_of(number), "timestamp": f"{2014 + number % 3}-0{number % 9 + 1}-02T10:00:00Z"}
        for number in range(documents)
    ]
    records[0]["timestamp"] = None
    half = documents // 2
    del records[1]["timestamp"]
    lines = [json.dumps(record) for record in records[:half]]
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines, '{"text": ""}']) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist(records[half:]), folder / "b.parquet", row_group_size=50)


def settings(folder: Path, server: Server | None = None, **changes: Any) -> dict[str, Any]:
    """A whole curation, tiny."""
    endpoint = {"url": server.url if server else "http://127.0.0.1:9/v1", "model": "judge-70b", "concurrency": 8}
    quick = {"first_wait_seconds": 0.02, "longest_wait_seconds": 0.1, "pause_seconds": 0.1}
    return {
        "seed": 7,
        "on_bad_line": "skip",
        "corpora": {"web": {"path": str(folder)}},
        "endpoint": {**endpoint, **quick},
        "sample": {"documents_per_year": 1000, "year_field": "timestamp"},
        "judge": {},
        "train": {"dimension": 32, "word_ngrams": 2, "buckets": 5000, "rate": 0.5, "epochs": 8},
        "classify": {},
        "refine": {},
        **changes,
    }

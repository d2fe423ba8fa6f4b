"""A server that speaks chat completions with known answers and known failures, and corpora to curate."""

from __future__ import annotations

import gzip
import json
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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
    answered: bool = False


class Server:
    """What was asked, and how often about each document; `answer(request, times)` decides, from `times` = 1."""

    def __init__(self, answer: Callable[[Request, int], Reply]) -> None:
        self.answer, self.requests = answer, []
        self.under_way = self.most = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def times(self, number: int) -> int:
        return sum(request.document == number for request in list(self.requests))

    def take(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            times = self.times(request.document) if len(self.requests) < 500 else 1
        reply = self.answer(request, times)
        time.sleep(reply.seconds)
        return reply

    def leave(self) -> None:
        with self._lock:
            self.under_way -= 1


@contextmanager
def serving(answer: Callable[[Request, int], Reply]):
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            message = body["messages"][0]["content"]
            found = DOCUMENT.search(message)
            number = int(found[1]) if found else -1
            request = Request(number, message, body, dict(self.headers), time.monotonic(), self.path)
            reply = server.take(request)
            server.leave()
            if reply.cut:
                self.close_connection = True
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(_body(reply, message)).encode()
            try:
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                request.answered = True
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Many(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    listener = Many(("127.0.0.1", 0), Handler)
    server.port = listener.server_address[1]
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()


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

"""Asking a server: its failures, its limits, and what is never asked twice or written down."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from curate_tools import Reply, Request, serving

from megatron_octo.config.curate import Endpoint, Judge
from megatron_octo.data.curate.answers import Answer, Answers, Log
from megatron_octo.data.curate.ask import Forecast, Pile, ask_all
from megatron_octo.data.curate.client import Client, seconds_of
from megatron_octo.data.curate.pace import Pace
from megatron_octo.data.curate.prompts import Asked, asked_of
from megatron_octo.errors import ConfigError, EnvironmentProblem

QUICK = {"first_wait_seconds": 0.01, "longest_wait_seconds": 0.05, "pause_seconds": 0.05, "timeout_seconds": 5}
ASKED = Asked("Grade: {text}", 1000, {"model": "m", "temperature": 0.0, "top_p": 1.0, "max_tokens": 10})
FINE = Reply("fine")


def endpoint(url: str, **changes: Any) -> Endpoint:
    return Endpoint.model_validate({"url": url, "model": "m", **QUICK, **changes})


def ask(url: str, message: str = "document 1 x", **changes: Any) -> Answer:
    async def once() -> Answer:
        async with Client(endpoint(url, **changes), ASKED) as client:
            return await client.ask(message)

    return asyncio.run(once())


def ask_about(url: str, log: Path, count: int, **changes: Any) -> list[str]:
    """Ask about some documents as a step does; returns what was finished."""
    finished: list[str] = []
    documents = [(f"web/a:{number}", f"document {number} x") for number in range(count)]
    pile = Pile(log, lambda pulse: documents, lambda: finished.append("pile"))
    ask_all("judge", [pile], ASKED, endpoint(url, **changes), Forecast.of(ASKED, count, count * 12, 100))
    return finished


def answers(log: Path) -> dict[str, Answer]:
    index = Log(log).index()
    with Log(log).open() as file:
        return {key: Log(log).read(file, offset) for key, offset in index.items()}


def test_a_question_is_sent_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with serving(lambda *_: Reply("fine", finish="stop")) as server:
        found = ask(server.url + "/", key_variable="SOME_KEY")
    (request,) = server.requests
    assert found == Answer(text="fine", finish="stop", tokens=(3, 1))
    assert request.path == "/v1/chat/completions" and request.headers["Authorization"] == "Bearer sk-secret"
    messages = [{"role": "user", "content": "document 1 x"}]
    assert request.body == {**ASKED.settings, "messages": messages}


GARBAGE = [b"<html>", b'{"choices": []}', b"{}", b"[]", b'{"choices": [{"message": null}]}', b"\xff\xfe", b""]


@pytest.mark.parametrize(
    ("first", "what"),
    [
        (Reply(status=500), "HTTP 500"),
        (Reply(status=503, headers={"Retry-After": "0"}), "HTTP 503"),
        (Reply(cut=True), "no connection"),
        (Reply("late", seconds=0.6), "time-out"),
        *[(Reply(body=content), "garbage instead of an answer") for content in GARBAGE],
    ],
)
def test_what_may_pass_is_asked_again_and_ends_some_time(first: Reply, what: str) -> None:
    with serving(lambda _, times: first if times < 3 else FINE) as server:
        assert ask(server.url, timeout_seconds=0.3).text == "fine" and len(server.requests) == 3
    with serving(lambda *_: first) as server:
        found = ask(server.url, timeout_seconds=0.3, attempts=2)
        assert found.failure is not None and found.failure.startswith(what) and len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(status=400, body={"error": {"message": "maximum context length is 8192"}}), "HTTP 400: maximum context"),
        (Reply(status=413, body=b"too large"), "HTTP 413: too large"),
        (Reply(""), "empty answer"),
        (Reply("partly", finish="content_filter"), "content filter"),
        (Reply(body={"choices": [{"message": {"content": None, "refusal": "I won't"}}]}), "refusal"),
        (Reply(body={"choices": [{"message": {"content": None}}]}), "empty answer"),
    ],
)
def test_what_lies_in_the_document_is_not_asked_again(reply: Reply, error: str) -> None:
    with serving(lambda *_: reply) as server:
        found = ask(server.url)
    assert found.error is not None and found.error.startswith(error) and len(server.requests) == 1


def test_the_thinking_of_a_reasoning_model_is_not_its_answer() -> None:
    with serving(lambda *_: Reply("<think>\nFinal score: 5?\n</think>\n\nFinal score: 2")) as server:
        assert ask(server.url).text == "Final score: 2"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(status=401, body={"error": {"message": "Incorrect API key: sk-secret"}}), "does not take the key"),
        (Reply(status=403), "does not take the key; fix: set SOME_KEY"),
        (Reply(status=404, body={"error": {"message": "The model `m` does not exist"}}), "The model `m` does not"),
        (Reply(status=307, headers={"Location": "http://127.0.0.1:1/"}), "answers 307"),
        (Reply(status=429, body={"error": {"message": "pay", "code": "insufficient_quota"}}), "quota is used up"),
        (Reply(status=418), "answers 418"),
    ],
)
def test_what_no_repetition_mends_ends_the_run_at_once(
    reply: Reply, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with serving(lambda *_: reply) as server, pytest.raises(EnvironmentProblem, match=words) as caught:
        ask_about(server.url, tmp_path / "log", 50, key_variable="SOME_KEY", concurrency=4)
    assert len(server.requests) <= 4
    said = str(caught.value) + "".join(capfd.readouterr())
    assert "secret" not in said and not (tmp_path / "log").read_bytes()


def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with serving(lambda *_: FINE) as server:
        with pytest.raises(ConfigError, match="variable SOME_KEY is not set"):
            ask_about(server.url, tmp_path / "log", 3, key_variable="SOME_KEY")
        monkeypatch.setenv("SOME_KEY", "sk two words")
        with pytest.raises(ConfigError, match="SOME_KEY holds no key") as caught:
            ask_about(server.url, tmp_path / "log", 3, key_variable="SOME_KEY")
        assert "two words" not in str(caught.value)
        monkeypatch.setenv("SOME_KEY", "sk-secret")
        ask_about(server.url, tmp_path / "log", 3, key_variable="SOME_KEY")
    assert len(server.requests) == 3 and b"secret" not in (tmp_path / "log").read_bytes()


def test_a_server_that_asks_for_patience_gets_it(tmp_path: Path) -> None:
    """Nobody asks anything before the time is over, and waiting does not count as an attempt."""
    wait = Reply(status=429, headers={"Retry-After": "0.4"})
    with serving(lambda *_: wait if len(server.requests) < 2 else FINE) as server:
        ask_about(server.url, tmp_path / "log", 3, concurrency=1, attempts=1)
    times = [request.time for request in server.requests]
    assert len(times) == 4 and times[1] - times[0] >= 0.4
    assert {answer.text for answer in answers(tmp_path / "log").values()} == {"fine"}
    for headers, patience in (({"Retry-After": "100"}, 50), ({}, 0.3)):
        reply = Reply(status=429, headers=headers)
        with serving(lambda *_, reply=reply: reply) as server, pytest.raises(EnvironmentProblem) as caught:
            ask(server.url, patience_seconds=patience)
        assert "answers only that it wants to wait" in str(caught.value) and "requests_per_minute" in str(caught.value)


def test_the_pause_holds_for_all_requests(tmp_path: Path) -> None:
    """The first answer asks for a pause while another request is under way; then nothing comes for a while."""
    wait, slow = Reply(status=429, headers={"Retry-After": "1"}), Reply("fine", seconds=0.3)
    with serving(lambda *_: wait if len(server.requests) == 1 else slow) as server:
        ask_about(server.url, tmp_path / "log", 6, concurrency=2)
    late = [request.time - server.requests[0].time for request in server.requests[2:]]
    assert len(late) == 5 and min(late) >= 0.9


def test_a_server_that_is_down_ends_the_run_with_what_was_answered_kept(tmp_path: Path) -> None:
    with serving(lambda request, _: FINE if request.document < 10 else Reply(status=500)) as server:
        with pytest.raises(EnvironmentProblem, match="does not answer: .* requests in a row failed.* HTTP 500"):
            ask_about(server.url, tmp_path / "log", 400, concurrency=4, attempts=6, failures=20, trials=3)
        # 20 failures in a row, those under way before and after, and three single tries
        assert len(server.requests) <= 10 + 20 + 8 + 3
    kept = answers(tmp_path / "log")
    assert sum(answer.text == "fine" for answer in kept.values()) == 10
    with pytest.raises(EnvironmentProblem, match="does not answer: .*no connection"):  # one try where it never did
        ask_about("http://127.0.0.1:9/v1", tmp_path / "log", 30, failures=8, attempts=3, pause_seconds=1, trials=99)


def test_a_server_that_comes_back_is_asked_on(tmp_path: Path) -> None:
    with serving(lambda *_: Reply(status=502) if 5 < len(server.requests) < 20 else FINE) as server:
        assert ask_about(server.url, tmp_path / "log", 30, concurrency=3, failures=8, attempts=5) == ["pile"]
    assert Counter(answer.text for answer in answers(tmp_path / "log").values()) == {"fine": 30}


def test_a_server_that_takes_no_document_is_not_asked_about_all(tmp_path: Path) -> None:
    reply = Reply(status=400, body={"error": {"message": "unknown field top_p"}})
    words = "refuses every document: HTTP 400: unknown field top_p"
    with serving(lambda *_: reply) as server, pytest.raises(EnvironmentProblem, match=words):
        ask_about(server.url, tmp_path / "log", 300, concurrency=2, failures=20)
    assert len(server.requests) <= 22


def test_no_more_at_once_than_allowed_and_as_many(tmp_path: Path) -> None:
    with serving(lambda *_: Reply("fine", seconds=0.05)) as server:
        ask_about(server.url, tmp_path / "log", 60, concurrency=6)
    assert 4 <= server.most <= 6 and len(server.requests) == 60


def test_limits_per_minute(tmp_path: Path) -> None:
    with serving(lambda *_: FINE) as server:
        began = time.monotonic()
        ask_about(server.url, tmp_path / "log", 10, requests_per_minute=1200)
        assert time.monotonic() - began >= 0.45
    times = sorted(request.time for request in server.requests)
    assert times[-1] - times[0] >= 0.4


def test_limits_of_tokens_count_what_the_server_counted(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 900, "completion_tokens": 100}
    reply = Reply(body={"choices": [{"message": {"content": "fine"}}], "usage": usage})
    with serving(lambda *_: reply) as server:
        ask_about(server.url, tmp_path / "log", 6, tokens_per_minute=600_000, concurrency=1)
    times = [request.time for request in server.requests]
    assert times[-1] - times[0] >= 0.45  # 1000 tokens take 0.1 s


def test_a_pace_counts_what_came_out_larger() -> None:
    async def run() -> float:
        pace = Pace(600)  # 0.1 s each
        await pace.take(1)
        pace.correct(2)
        began = time.monotonic()
        await pace.take(1)
        return time.monotonic() - began

    assert 0.25 <= asyncio.run(run()) < 2
    assert asyncio.run(Pace(None).take(10**9)) is None


def test_no_question_twice(tmp_path: Path) -> None:
    """Neither in another run, nor for two documents of one text; another prompt, model or setting is another one."""
    log = tmp_path / "log"
    with serving(lambda *_: FINE) as server:
        ask_about(server.url, log, 20)
        ask_about(server.url, log, 25)
        assert len(server.requests) == 25
        twins = Pile(log, lambda pulse: [("a", "document 99 y"), ("b", "document 99 y")], lambda: None)
        ask_all("judge", [twins], ASKED, endpoint(server.url), Forecast(2, 1, 1))
        assert server.times(99) == 1
    keys = {ASKED.key("x"), ASKED.key("y"), Asked("Say: {text}", 1000, ASKED.settings).key("x")}
    others = [{**ASKED.settings, "model": "n"}, {**ASKED.settings, "temperature": 0.1}]
    keys |= {Asked(ASKED.prompt, 1000, settings).key("x") for settings in others}
    assert len(keys) == 4  # the message holds the prompt already: here both are "x"
    assert ASKED.message("x") != Asked("Say: {text}", 1000, ASKED.settings).message("x")


def test_a_text_is_asked_about_once_whatever_shards_it_stands_in(tmp_path: Path) -> None:
    """At the same time in two of them; and later in one of another name, for files are renamed and grow."""
    finished: list[str] = []

    def pile(name: str, numbers: list[int]) -> Pile:
        documents = [(f"web/{name}:{number}", f"document {number} x") for number in numbers]
        return Pile(tmp_path / f"{name}.jsonl", lambda pulse: documents, lambda: finished.append(name))

    def texts(name: str) -> set[str | None]:
        return {answer.text for answer in answers(tmp_path / f"{name}.jsonl").values()}

    def answer(request: Request, times: int) -> Reply:
        return Reply(f"about {request.document}, time {times}", seconds=0.02)

    several = {"a": [*range(10)], "b": [*range(5, 15)], "c": [*range(8, 20)]}
    with serving(answer) as server:
        piles = [pile(name, numbers) for name, numbers in several.items()]
        ask_all("judge", piles, ASKED, endpoint(server.url, concurrency=4), Forecast(32, 1, 1))
        assert sorted(request.document for request in server.requests) == list(range(20))
        ask_all("judge", [pile("renamed", [*range(20)])], ASKED, endpoint(server.url), Forecast(20, 1, 1))
        assert len(server.requests) == 20
    for name, numbers in {**several, "renamed": [*range(20)]}.items():
        assert texts(name) == {f"about {number}, time 1" for number in numbers}
    assert sorted(finished) == ["a", "b", "c", "renamed"]


def test_answers_are_found_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or not, in the right one of many logs; a failure is none, and a hash that begins alike is another one."""
    monkeypatch.setattr("megatron_octo.data.curate.answers._MERGED", 7)
    keys = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(60)]
    logs = [tmp_path / f"{number}.jsonl" for number in range(4)]
    for number, key in enumerate(keys[:50]):
        with Log(logs[number % 4]) as log:
            log.add(key, "x", Answer(text=str(number)))
    with Log(logs[0]) as log:
        log.add(keys[50], "x", Answer(failure="HTTP 500"))
    found = Answers(logs)
    for number, key in enumerate(keys[51:], start=51):
        with Log(logs[number % 2]) as log:
            found.add(key, logs[number % 2], log.add(key, "x", Answer(text=str(number))))
    assert [getattr(found.find(key), "text", None) for key in keys] == [
        None if number == 50 else str(number) for number in range(60)
    ]
    assert found.find(keys[3][:16] + "0" * 16) is None and found.find("f" * 32) is None


def test_reading_stalls_no_request(tmp_path: Path) -> None:
    """Of documents that are left out there may be many between two questions: others are asked meanwhile, in time."""
    asked: list[int] = []

    def texts(pulse: Any) -> Any:
        for number in range(4):
            yield f"web/a:{number}", f"document {number} x"
            time.sleep(0.5)
            asked.append(len(server.requests))

    with serving(lambda *_: FINE) as server:
        pile = Pile(tmp_path / "log", texts, lambda: None)
        ask_all("judge", [pile], ASKED, endpoint(server.url, timeout_seconds=0.4, attempts=1), Forecast(4, 1, 1))
        assert len(server.requests) == 4 and asked[2] >= 2
    assert {answer.failure for answer in answers(tmp_path / "log").values()} == {None}


def test_reading_ends_when_asking_does(tmp_path: Path) -> None:
    def texts(pulse: Any) -> Any:
        yield "web/a:1", "document 1 x"
        time.sleep(0.2)  # what was read is handed over
        yield "web/a:2", "document 2 x"
        while time.monotonic() < began + 10:
            time.sleep(0.01)
            pulse()

    began = time.monotonic()
    with serving(lambda *_: Reply(status=401)) as server, pytest.raises(EnvironmentProblem, match="wants a key"):
        ask_all("judge", [Pile(tmp_path / "log", texts, lambda: None)], ASKED, endpoint(server.url), Forecast(1, 1, 1))
    assert time.monotonic() - began < 5


def test_a_failure_is_asked_again_and_a_better_answer_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(lambda request, _: Reply(status=500) if request.document == 3 else FINE) as server:
        assert ask_about(server.url, log, 5, attempts=2) == ["pile"]
    assert [a.failure for a in answers(log).values() if a.failure] == ["HTTP 500"]
    with serving(lambda *_: FINE) as server:
        ask_about(server.url, log, 5)
        assert [request.document for request in server.requests] == [3]
    assert {answer.text for answer in answers(log).values()} == {"fine"}


def test_what_a_killed_process_left_of_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Log(path) as log:
        log.add("aa", "web/a:1", Answer(text="é" * 70_000))
        log.add("bb", "web/a:2", Answer(text="two"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key":"cc","text":"thr' + b"x" * 70_000)
    assert Log(path).answered() == {"aa", "bb"}
    with Log(path) as log:
        log.add("cc", "web/a:3", Answer(error="refusal"))
    assert path.read_bytes().startswith(whole) and Log(path).answered() == {"aa", "bb", "cc"}
    assert json.loads(path.read_bytes().splitlines()[-1]) == {
        "key": "cc", "id": "web/a:3", "error": "refusal", "tokens": [0, 0],
    }  # fmt: skip


def test_the_forecast_comes_before_the_first_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def answer(request: Request, _: int) -> Reply:
        said.append(capfd.readouterr().err)
        return FINE

    said: list[str] = []
    with serving(answer) as server:
        ask_about(server.url, tmp_path / "log", 1, tokens_per_minute=100_000)
    assert "judge: 1 documents for m: about 6 tokens in and 10 out, 0s or more at the limits per minute" in said[0]
    cut = Forecast.of(ASKED, 10, 100_000, 4000)
    assert (cut.tokens_in, cut.tokens_out) == ((10 * 1000 + 10 * len(ASKED.prompt)) // 4, 10 * 10)


@pytest.mark.parametrize(
    ("after", "seconds"),
    [(None, None), ("3", 3.0), ("0.5", 0.5), ("-2", 0.0), ("soon", None), ("nan", None), ("inf", None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("", None)],
)  # fmt: skip
def test_retry_after(after: str | None, seconds: float | None) -> None:
    assert seconds_of(after) == seconds


def test_prompts(tmp_path: Path) -> None:
    question = Judge()
    asked = asked_of(question, "m", "judge")
    assert asked.message("{braces} \\frac{1}{2}").count("{braces} \\frac{1}{2}") == 1
    assert len(asked.message("x" * 40_000)) == len(asked.prompt) - 6 + 32_000
    path = tmp_path / "prompt.txt"
    for text, words in (("Grade this.", "holds {text} 0 times"), ("{text} {text}", "2 times")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            asked_of(Judge(prompt=str(path)), "m", "judge")
    with pytest.raises(ConfigError, match="judge.prompt: .*nowhere.txt cannot be read"):
        asked_of(Judge(prompt="nowhere.txt"), "m", "judge")

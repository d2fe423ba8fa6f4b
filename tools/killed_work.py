"""What `kill_builds.py` kills: a build with everything in it and its kin, tiny, as the commands that a user gives."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import signal
import stat
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from megatron_octo.files import LOCK

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("r", "st", "n", "l")]
CURATED, CONCURRENCY = 160, 8

_SBATCH = """\
#!/bin/bash
# Stands in for the scheduler: runs the tasks of an array as a plain shell would, two at a time.
set -e
job="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$job")
for ((number = 0; number <= ${last:-0}; number += 2)); do
  SLURM_ARRAY_TASK_ID=$number bash "$job" & first=$!
  if ((number < ${last:-0})); then SLURM_ARRAY_TASK_ID=$((number + 1)) bash "$job"; fi
  wait $first
done
echo 1
"""


class Work(NamedTuple):
    """Something to kill.

    Args:
        name: of the kind.
        truth: kinds that name the same must leave the same bytes.
        command: arguments of `octo`, from the directory to write, the number of workers and the number of the run.
        victims: what may die: the process that was started, a worker of it, all at once.
        prepare: makes the directory before the first start; returns the content of the files that are not as they
            should be, None for those that are missing.
        settle: looks at what a finished run did outside its directory; returns complaints, from run and kills.
        environment: further variables.
        most_workers: how many of its own it may have.
    """

    name: str
    truth: str
    command: Callable[[Path, int, str], list[str]]
    victims: tuple[str, ...] = ("started", "worker", "all")
    prepare: Callable[[Path, random.Random], dict[str, bytes | None]] = lambda out, chance: {}
    settle: Callable[[str, int], list[str]] = lambda run, kills: []
    environment: tuple[tuple[str, str], ...] = ()
    most_workers: int = 2


def _text(chance: random.Random, words: int = 40) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words)) + "."


def _lines(rows: list[Any]) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def write_inputs(folder: Path) -> dict[str, Any]:
    """Corpora of every format with duplicates, near duplicates, leaks, bad lines and budgets; returns the build."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    chance = random.Random(7)
    texts = [_text(chance) for _ in range(60)]
    questions = [f"How many {_text(chance, 16)[:-1]} are there in all?" for _ in range(5)]
    texts[7], texts[9] = texts[3], f"{_text(chance, 5)} {questions[0]} {_text(chance, 5)}"
    (folder / "web").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": texts[30 * number : 30 * number + 30]})
        pyarrow.parquet.write_table(table, folder / "web" / f"{number}.parquet", row_group_size=10)
    plain = [{"text": texts[40]}, "no JSON", {"text": ""}, {"other": 1}, *({"text": _text(chance)} for _ in range(30))]
    plain.insert(9, {"text": " ".join([*texts[20].split()[:-1], "end."])})
    (folder / "notes.jsonl").write_bytes(_lines(plain))
    packed = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(packed, closefd=False) as stream:
        leak = {"text": f"{_text(chance, 9)} {questions[1]}"}
        stream.write(_lines([leak, *({"text": _text(chance)} for _ in range(20))]))
    (folder / "more.jsonl.zst").write_bytes(packed.getvalue())
    for number in range(3):
        rows = [{"text": _text(chance)} for _ in range(12)]
        (folder / f"some-{number}.jsonl.gz").write_bytes(gzip.compress(_lines([*rows, {"text": texts[number]}])))
    heldout = [{"id": f"h{n}", "question": f"What is {n} and {_text(chance, 9)}", "answer": "3"} for n in range(4)]
    (folder / "heldout.jsonl").write_bytes(_lines(heldout))
    asked = [{"question": heldout[0]["question"], "answer": "3"}]
    asked += [{"question": f"What is {_text(chance, 9)}", "answer": str(n)} for n in range(20)]
    (folder / "qa.jsonl").write_bytes(_lines(asked))
    (folder / "gsm8k.jsonl").write_bytes(_lines([{"question": question, "answer": "#### 4"} for question in questions]))
    return {
        "tokenizer": {"train": {"vocabulary_size": 320, "documents": 20}},
        "world": {"tokens": {"instruction": 600}},
        "corpora": {
            "web": {"path": str(folder / "web")},
            "notes": {"path": str(folder / "notes.jsonl")},
            "more": {"path": str(folder / "more.jsonl.zst")},
            "qa": {"path": str(folder / "qa.jsonl"), "adapter": "qa"},
            "some": {"path": str(folder / "some-*.jsonl.gz"), "tokens": 2000},
        },
        "problems": {"heldout": {"file": {"path": str(folder / "heldout.jsonl")}}},
        "on_bad_line": "skip",
        "deduplicate": {"partitions": 3, "near": {"buckets": 4, "hashes_per_bucket": 8}},
        "decontaminate": {"against": {"gsm8k": {"path": str(folder / "gsm8k.jsonl")}}, "measure": 4},
    }


def works(folder: Path, truth: Callable[[str], dict[str, bytes]], server: str) -> dict[str, Work]:
    """All kinds, by name.

    Args:
        folder: where the inputs are written.
        truth: what an undisturbed run of a kind leaves.
        server: URL of the stand-in for a model's server, see `serve`.
    """
    inputs = folder / "inputs"
    inputs.mkdir()
    mix = inputs / "mix.yaml"
    mix.write_text(json.dumps(write_inputs(inputs)))  # JSON is YAML
    bin_ = folder / "bin"
    bin_.mkdir()
    (bin_ / "sbatch").write_text(_SBATCH)
    (bin_ / "sbatch").chmod(stat.S_IRWXU)

    def build(out: Path, workers: int, run: str, *more: str) -> list[str]:
        return ["data", "build", str(mix), "--out", str(out), "--workers", str(workers), *more]

    def clean(name: str, *more: str) -> Callable[[Path, int, str], list[str]]:
        paths = [f"web={inputs}/web", f"notes={inputs}/notes.jsonl", f"more={inputs}/more.jsonl.zst"]
        return lambda out, workers, run: [
            "data", name, *paths, "--out", str(out), "--skip-bad", "--workers", str(workers), *more
        ]  # fmt: skip

    against = ("--against", f"gsm8k={inputs / 'gsm8k.jsonl'}")
    curation = _Curation(inputs, server)
    path = (("PATH", f"{bin_}:{os.environ['PATH']}"),)
    found = [
        Work("build", "build", build),
        Work("repair", "build", build, prepare=lambda out, chance: damage(out, truth("build"), chance)),
        Work(
            "slurm", "build", lambda out, workers, run: build(out, workers, run, "--executor", "slurm"),
            ("worker", "all"), environment=path, most_workers=1,
        ),
        Work("dedup", "dedup", clean("dedup", *against)),
        Work("decontaminate", "decontaminate", clean("decontaminate", *against)),
        Work("curate", "curate", curation.command, settle=curation.settle),
        Work("ray", "build", lambda out, workers, run: build(out, 2, run, "--executor", "ray"), ("started", "all")),
    ]  # fmt: skip
    return {work.name: work for work in found}


def damage(out: Path, truth: dict[str, bytes], chance: random.Random) -> dict[str, bytes | None]:
    """A finished build of which one to three files are gone, cut, or differ in one bit; returns what they hold."""
    for name, content in truth.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (out / LOCK).touch()  # a build leaves it: by it the directory is known as ours where the manifest is gone
    names = chance.sample(sorted(truth), chance.randint(1, 3))
    found: dict[str, bytes | None] = {}
    for name in names:
        content = truth[name]
        how = "gone" if name == "manifest.json" or not content else chance.choice(("gone", "cut", "bit"))
        if how == "gone":
            (out / name).unlink()
            found[name] = None
            continue
        place = chance.randrange(len(content))
        bit = bytes([content[place] ^ (1 << chance.randrange(8))])
        found[name] = content[:place] if how == "cut" else content[:place] + bit + content[place + 1 :]
        (out / name).write_bytes(found[name] or b"")
    return found


class _Curation:
    """A curation of two shards that share some texts, against the stand-in for a model's server."""

    def __init__(self, folder: Path, server: str) -> None:
        self._folder, self._server = folder, server
        (folder / "pages").mkdir()
        rows = [{"text": _document(number)} for number in range(CURATED)]
        half = CURATED // 2
        (folder / "pages" / "a.jsonl").write_bytes(_lines([*rows[:half], {"text": ""}]))
        (folder / "pages" / "b.jsonl.gz").write_bytes(gzip.compress(_lines([*rows[half:], *rows[:10]]), mtime=0))

    def command(self, out: Path, workers: int, run: str) -> list[str]:
        """Every run has an address of its own, where its questions are counted; it is no part of the result."""
        file = self._folder / f"curation-{run}.yaml"
        endpoint = {"url": f"{self._server}/{run}/v1", "model": "any", "concurrency": CONCURRENCY}
        waits = {"first_wait_seconds": 0.01, "longest_wait_seconds": 0.05, "pause_seconds": 0.05}
        values = {
            "seed": 7,
            "on_bad_line": "skip",
            "corpora": {"pages": {"path": str(self._folder / "pages")}},
            "endpoint": {**endpoint, **waits},
            "sample": {"documents_per_year": 150},
            "judge": {},
            "train": {
                "dimension": 8, "word_ngrams": 1, "buckets": 100, "rate": 0.5, "epochs": 8, "minimum_count": 1,
                "held_out": 0.3,
            },
            "classify": {},
            "refine": {},
        }  # fmt: skip
        file.write_text(json.dumps(values))
        return ["data", "curate", str(file), "--out", str(out), "--workers", str(workers)]

    def settle(self, run: str, kills: int) -> list[str]:
        """What is asked twice was under way when the run was killed."""
        with urllib.request.urlopen(f"{self._server}/{run}/count", timeout=10) as response:
            found = json.load(response)
        if found["answers"] - found["questions"] <= kills * CONCURRENCY:
            return []
        return [f"{found['answers']} answers to {found['questions']} questions after {kills} kills"]


def _good(number: int) -> bool:
    return random.Random(number).random() < 0.4


def _document(number: int) -> str:
    draw = random.Random(number)
    words = ["theorem", "proof", "lemma", "angle"] if _good(number) else ["shipping", "discount", "cart", "login"]
    return f"document {number} " + " ".join(draw.choices(words, k=12) + draw.choices(WORDS, k=12))


def serve(listening: int) -> None:
    """Answer as a model's server would, to the end of this process; writes the port to a pipe.

    An answer follows from the question. Every tenth question is first refused for a moment, as a busy server does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    known: dict[str, Counter[str]] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            number = int(re.search(r"document (\d+) ", message)[1])  # type: ignore[index]
            with lock:
                counts = known.setdefault(self.path.split("/")[1], Counter())
                counts[f"tried {message}"] += 1
                busy = number % 10 == 0 and counts[f"tried {message}"] == 1
                counts[message] += not busy
            if busy:
                self._answer(503, {"error": "busy"})
                return
            document = message.split("---\n")[1].strip() if "Final score" not in message else ""
            score = number % 3 + (3 if _good(number) else 0)
            text = document.upper() or f"Some reasoning.\nFinal score: {score}"
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self._answer(200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})

        def do_GET(self) -> None:
            counts = known.get(self.path.split("/")[1], Counter())
            asked = [count for message, count in counts.items() if count and not message.startswith("tried ")]
            self._answer(200, {"answers": sum(asked), "questions": len(asked)})

        def _answer(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # whoever asked was killed
                super().handle_error(request, address)

    server = Server(("127.0.0.1", 0), Handler)
    os.write(listening, str(server.server_port).encode())
    os.close(listening)
    server.serve_forever()

"""The child process that compares answers symbolically; run by path, imports nothing of the project.

Reads one JSON object {"gold", "answer"} a line, writes "1", "0" or "M" (out of memory) a line. Each comparison has a
budget of CPU seconds: a kernel timer kills the process when it is spent, even inside one endless multiplication
of C code, and a busy machine does not shorten it. The process can write no file and open no core.
"""

from __future__ import annotations

import functools
import json
import logging
import resource
import signal
import sys
from typing import Any

_MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Serve comparisons until the parent closes the pipe."""
    cpu_seconds = float(sys.argv[1])
    logging.disable(logging.CRITICAL)
    # The default action of the timer's signal is to end the process.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    read, equal = _load()
    for kind, limit in ((resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        verdict = _compare(read, equal, task["gold"], task["answer"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, flush=True)


def _load() -> tuple[Any, Any]:
    """math-verify with its own wall-clock alarms off and without its plain-expression reader, which evaluates."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(answer: str) -> list[Any]:
        return parse(rf"\boxed{{{answer}}}", extraction_config=(LatexExtractionConfig(),), parsing_timeout=None)

    return (functools.lru_cache(4096)(read), read), functools.partial(verify, timeout_seconds=None)


def _compare(read: Any, equal: Any, gold: str, answer: str) -> str:
    read_gold, read_answer = read
    try:
        return "1" if equal(read_gold(gold), read_answer(answer)) else "0"
    except MemoryError:
        return "M"
    except Exception:
        return "0"


if __name__ == "__main__":
    main()

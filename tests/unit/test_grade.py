"""The one grader: its policy frozen in a table, hostile inputs, threads, killed workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_octo.errors import EnvironmentProblem
from megatron_octo.evaluate import symbolic
from megatron_octo.evaluate.grade import count_verdicts, grade, grade_many, same_answer
from megatron_octo.evaluate.symbolic import SymbolicPool, require_math_verify


@pytest.fixture(scope="module")
def pool() -> Iterator[SymbolicPool]:
    """One pool for the module: starting a child costs a second."""
    pool = SymbolicPool(size=2, cpu_seconds=1.0)
    yield pool
    pool.close()


@pytest.fixture
def shared(pool: SymbolicPool, monkeypatch: pytest.MonkeyPatch) -> SymbolicPool:
    monkeypatch.setattr(symbolic.shared, "_pool", pool)
    return pool


@pytest.fixture
def no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("this pair must be decided without symbols")  # no Exception: the grader cannot swallow it

    monkeypatch.setattr(symbolic.shared, "get", refuse)


CHEAP = [
    # gold, answer, equal
    ("5", "5", True), ("5", "6", False), ("5", "(5)", True), ("5", "{5}", True), ("5", "5.0", True), ("5", "+5", True),
    ("5", "05", True), ("0", "-0", True), ("-5", "\u22125", True), ("5", "-5", False), ("10", "10.", True),
    ("1234", "1,234", True), ("1234", r"1{,}234", True), ("1234", r"1\,234", True), ("12", "1,2", False),
    ("1234", "12,34", False), ("0.5", r"\frac12", True), ("1/2", "\u00bd", True), ("1/2", "2/4", True),
    ("-1/2", r"\frac{-1}{2}", True), ("3.5", "3\u00bd", True), ("3.5", r"3\frac{1}{2}", True), ("3.5", "3 1/2", True),
    ("1/2", r"\dfrac{1}{2}", True), ("27.0", "27", True), ("5", "$5$", True), ("5", "1 5", False),
    # percent: the sign may be a unit or a hundredth; without a sign a factor of 100 is an error
    ("25", "25%", True), ("25", r"25\%", True), ("25%", "25", True), ("25%", "0.25", True), ("0.25", "25%", True),
    ("25", "0.25", False), ("0.25", "25", False), ("25%", "2500", False), ("25%", "25%", True), ("50%", "5%", False),
    ("25", "25 percent", True), ("25", r"25 \text{ percent}", True),
    # units: one side may leave it out; two different ones differ
    ("5", "5 cm", True), ("5", r"5\text{ cm}", True), ("5 cm", "5", True), ("5 cm", "5 m", False), ("5", "5cm", True),
    (r"5\text{ cm}", "5 cm", True), ("18", r"\$18", True), ("18", "18 dollars", True), ("18", "18 eggs", True),
    ("90", r"90^\circ", True), ("90", "90\u00b0", True), ("5000000", "5 million", True),
    ("5", r"5\text{ million}", False), ("24", "2 dozen eggs", True),
    # rounding: six or more written places stand for what they round
    ("1/3", "0.333333", True), ("1/3", "0.3333", False), ("1/3", "0.333334", False), ("0.1", "0.10000001", True),
    ("1000000", "1000001", False),
    # what is no answer to a number
    ("9", "7+5-3", False), ("9", "7+5-3=9", True), ("5", "x=5", True), ("9", "7+", False), ("5", "five", False),
    ("5", "Ana", False), ("5", "=", False), ("5", "5 5", False), ("1", "1/0/1", False), ("5", "3,5", False),
    # brackets
    ("[1,2)", "(1,2]", False), ("(1,2)", "[1,2]", False), ("[1,2)", "[1, 2)", True), ("(1,2)", "(2,1)", False),
    ("(1,2)", "(1,2,3)", False), ("(1/2,3)", "(0.5,3)", True), (r"x \in [1,2)", "[1,2)", True),
    (r"(-\infty,1]\cup[2,3)", r"(-\infty,1]\cup[2,3]", False), ("(1,2)", "(1,)", False),
    # text
    (r"\text{Evelyn}", "evelyn", True), ("Tuesday", r"\text{tuesday}", True), (r"\frac{\pi}{2}", r"\frac{\pi}2", True),
    ("5", "", False), ("", "", False), ("", "5", False), (r"\boxed{5}", r"\boxed{5}", True),
]  # fmt: skip


@pytest.mark.usefixtures("no_pool")
@pytest.mark.parametrize(("gold", "answer", "equal"), CHEAP)
def test_cheap_decisions(gold: str, answer: str, equal: bool) -> None:
    assert same_answer(gold, answer) is equal


SYMBOLIC = [
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True), ("x^2+1", "1+x^2", True), ("x^2+1", "x^2-1", False),
    ("1,2", "2,1", True), (r"(3,\frac{\pi}{2})", r"(3, \pi/2)", True), ("1024", "2^{10}", True),
    ("300000", r"3 \times 10^5", True), ("5", "5x", False), ("5", r"x \le 5", False),
    (r"\frac{\pi}{2}", "\u03c0/2", True), ("1", "1/0", False), ("5", r"\undefined{", False),
]  # fmt: skip


def test_symbolic_decisions(shared: SymbolicPool) -> None:
    assert [same_answer(gold, answer) for gold, answer, _ in SYMBOLIC] == [equal for *_, equal in SYMBOLIC]
    assert shared.started <= 1


def test_verdicts() -> None:
    assert grade(r"\boxed{5}", "5", stopped=True).verdict == "correct"
    assert grade(r"\boxed{5} or \boxed{6}", "5", stopped=True).verdict == "wrong"
    assert grade("5", "5", stopped=True).verdict == "no_answer"
    assert grade(r"\boxed{}", "5", stopped=True).verdict == "no_answer"
    cut = grade(r"\boxed{5} and so on", "5", stopped=False)
    assert (cut.verdict, cut.correct, cut.extracted, cut.reward) == ("not_stopped", False, "5", 0.0)
    assert grade(r"\boxed{5}", "5", stopped=False, require_stop=False).reward == 1.0
    assert grade(r"\boxed{5}", r"so \boxed{5}", stopped=True).correct


def test_counts_name_every_verdict() -> None:
    verdicts = grade_many([(r"\boxed{5}", "5", True), (r"\boxed{5}", "5", False), ("", "5", True)])
    assert count_verdicts(verdicts) == {"correct": 1, "wrong": 0, "no_answer": 1, "not_stopped": 1, "timed_out": 0}
    assert grade_many([]) == []


@pytest.mark.usefixtures("no_pool")
def test_a_megabyte_is_graded_at_once() -> None:
    started = time.process_time()
    assert grade(r"\boxed{" + "9" * 1_000_000 + "}", "5", stopped=True).verdict == "wrong"
    assert grade(r"\boxed{" + r"\frac{1}{" * 100_000 + "}" * 100_001, "5", stopped=True).verdict == "wrong"
    assert time.process_time() - started < 5


def test_code_is_not_executed(shared: SymbolicPool, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = f"__import__('os').system('touch {marker}')"
    for answer in (code, rf"\text{{{code}}}+1", rf"\sqrt{{5}} + {code}", f"open('{marker}','w').write('5')"):
        assert not grade(rf"\boxed{{{answer}}}", "5", stopped=True).correct
        assert not grade(rf"\boxed{{{answer}}}", r"\sqrt{5}", stopped=True).correct
    assert not marker.exists()


def test_a_comparison_can_write_no_file_and_take_no_more_than_its_memory(shared: SymbolicPool) -> None:
    assert shared.equal(r"\sqrt{4}", "2") is True
    limits = Path(f"/proc/{shared._workers[0].process.pid}/limits").read_text()
    rows = {line[:25].strip(): line[25:].split()[:2] for line in limits.splitlines()}
    assert rows["Max file size"] == rows["Max core file size"] == ["0", "0"]
    assert rows["Max address space"] == [str(4 * 2**30)] * 2


@pytest.mark.usefixtures("no_pool")
def test_long_expressions_are_not_worth_a_comparison() -> None:
    assert grade(r"\boxed{" + "x+" * 600 + "x}", "y^2", stopped=True).verdict == "wrong"


def test_endless_powers_time_out_and_the_pool_recovers(shared: SymbolicPool) -> None:
    started = time.monotonic()
    verdict = grade(r"\boxed{9^{9^{9^{9}}}}", "5", stopped=True)
    assert (verdict.verdict, verdict.correct) == ("timed_out", False)
    assert time.monotonic() - started < shared.wall_seconds
    assert grade(r"\boxed{10^10^10}", "5", stopped=True).verdict in ("wrong", "timed_out")
    assert grade(r"\boxed{\sqrt{49}}", "7", stopped=True).correct
    assert all(worker.process.poll() is None for worker in shared._workers)
    repeated = time.monotonic()
    assert grade(r"\boxed{9^{9^{9^{9}}}}", "5", stopped=True).verdict == "timed_out"
    assert time.monotonic() - repeated < 0.5, "a pair that ran out of its budget is remembered"


def test_many_threads_get_their_own_answers(shared: SymbolicPool) -> None:
    cases = [(rf"\boxed{{\sqrt{{{n * n}}}}}", str(n + n % 2), True) for n in range(2, 26)]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda case: grade(case[0], case[1], stopped=case[2]), cases))
    assert [verdict.correct for verdict in verdicts] == [n % 2 == 0 for n in range(2, 26)]
    assert verdicts == grade_many(cases)
    assert len(shared._workers) <= shared.size


def test_a_worker_killed_while_it_compares_is_replaced() -> None:
    pool = SymbolicPool(size=1, cpu_seconds=1.0)
    answers: list[bool | None] = []
    assert pool.equal(r"\sqrt{4}", "2") is True
    victim = pool._workers[0].process
    asking = threading.Thread(target=lambda: answers.append(pool.equal("5", "8^{8^{8^{8}}}")))
    asking.start()
    time.sleep(0.3)
    os.kill(victim.pid, signal.SIGKILL)
    asking.join(60)
    assert answers == [None] and pool.started == 2
    assert pool.equal(r"\sqrt{9}", "3") is True
    pool.close()
    assert pool._workers == []


def test_workers_that_died_idle_are_no_verdict() -> None:
    pool = SymbolicPool(size=3)
    idle = [pool._take() for _ in range(3)]
    pool._idle += idle
    for worker in idle:
        worker.process.kill()
        worker.process.wait()
    assert pool.equal(r"\sqrt{4}", "2") is True
    assert len(pool._workers) == 1
    pool.close()


def test_a_worker_that_hangs_without_cpu_meets_the_deadline() -> None:
    pool = SymbolicPool(size=1, cpu_seconds=5.0, wall_seconds=0.5)
    assert pool._take() in pool._workers
    worker = pool._workers[0]
    pool._idle.append(worker)
    os.kill(worker.process.pid, signal.SIGSTOP)
    pool._attempt = _once(pool._attempt)  # type: ignore[method-assign]
    assert pool.equal(r"\sqrt{4}", "2") is None
    assert worker.process.poll() is not None
    pool.close()


def _once(attempt):
    """No second try: it would find a healthy worker."""

    def limited(gold: str, answer: str) -> bool | None:
        limited.calls += 1
        if limited.calls > 1:
            raise symbolic._Died("no second try")
        return attempt(gold, answer)

    limited.calls = 0
    return limited


def test_a_missing_package_is_named_before_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="math-verify"):
        require_math_verify()

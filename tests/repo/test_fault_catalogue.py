"""Every fault the catalogue lists is injected by a test that pytest collects."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from catalogue import COMPLETE, FAULTS, SIZES  # noqa: E402


class Collected:
    """A plugin that keeps the names of what pytest collects."""

    def __init__(self) -> None:
        self.cases: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.cases = {item.nodeid for item in session.items}


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Cases, and tests without their parameters; collected in this process, which has imported most of it."""
    files, found = sorted({fault.test.partition("::")[0] for fault in FAULTS}), Collected()
    plain = ["--collect-only", "--rootdir", str(ROOT), "-p", "no:xdist", "-p", "no:faulthandler"]
    assert pytest.main([*plain, *(str(ROOT / file) for file in files)], plugins=[found]) == 0
    return found.cases | {case.partition("[")[0] for case in found.cases}


def test_ids_are_those_of_the_groups() -> None:
    ids = [fault.id for fault in FAULTS]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    allowed = {f"{group}{number}" for group, size in SIZES.items() for number in range(1, size + 1)}
    assert set(ids) <= allowed
    assert {name for name in allowed if name[0] in COMPLETE} <= set(ids)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_has_a_test_and_a_guard(collected: set[str], fault) -> None:
    assert fault.test in collected
    assert fault.words and fault.guard

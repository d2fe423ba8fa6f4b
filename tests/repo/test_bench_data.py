"""The benchmark of the data engine measures what it says: one corpus for all, ratios round by round."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_octo.data.index.words import _LLAMA3

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_data", TOOLS / "bench_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_corpus_follows_from_its_seed(bench: ModuleType, tmp_path: Path) -> None:
    first, second = (bench.Corpus(2).write(tmp_path / name, 0.05) for name in ("a", "b"))
    assert first == second and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    texts = [json.loads(line)["text"] for line in (tmp_path / "a").read_text(encoding="utf-8").splitlines()]
    assert len(texts) == first and bench.Corpus(3).document() != texts[0] and "\\frac" in "".join(texts)


def test_ratios_belong_to_one_round(bench: ModuleType) -> None:
    found = {
        name: {"rates": rates, "starts": [1.0], "peaks": [90.0]}
        for name, rates in (("octo", [30.0, 3.0, 40.0]), ("datatrove", [10.0, 1.0, 20.0]))
    }  # a slow second round hits both alike
    assert bench.ratio(found, "datatrove") == 3.0 and bench.ratio(found, "megatron_lm") is None
    assert "30 (3-40)" in bench.table(found)


def test_the_cut_is_the_published_one(bench: ModuleType) -> None:
    assert bench.LLAMA3 == _LLAMA3


def test_a_program_that_fails_ends_the_benchmark_with_its_words(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="ended with 1:\nno such corpus"):
        bench.timed([sys.executable, "-c", "raise SystemExit('no such corpus')"], {})
    assert bench.timed([sys.executable, "-c", "sum(range(3_000_000))"], {}).cpu > 0.01


def test_another_file_is_noticed(bench: ModuleType, tmp_path: Path) -> None:
    def program(token: int):  # noqa: ANN202
        def run(file: Path, tokenizer: Path, out: Path):  # noqa: ANN202
            out.mkdir()
            (out / "x.bin").write_bytes(bytes([token, 0]))
            (out / "x.idx").write_bytes(b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08")
            return bench.Cost(1.0, 1.0, 1.0), out / "x"

        return run

    with pytest.raises(SystemExit, match="the files of octo, datatrove differ"):
        bench.compare({"octo": program(1), "datatrove": program(2)}, tmp_path, tmp_path, 1)

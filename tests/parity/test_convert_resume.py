"""A conversion that was killed leaves nothing under its name; given again it goes on, and ends as if never killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from convert_models import write_hf, write_tokenizer
from killed_conversion import CHANGED, COMPLETE, POINTS, convert

from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.convert.api import from_hf, verify
from megatron_octo.convert.compare import diff
from megatron_octo.convert.forward import single_process

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

HELD = (".safetensors", ".distcp")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The models, what each conversion makes of them undisturbed, and what kills left."""
    root = tmp_path_factory.mktemp("killed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_hf(root / "hf", write_tokenizer(root / "tokenizer"))
    write_hf(root / "hf2", root / "tokenizer", seed=4)
    from_hf(root / "hf", root / "checkpoint")
    from_hf(root / "hf2", root / "other")
    with single_process():
        for kind in ("from_hf", "to_hf", "average", "truncate"):
            convert(kind, root, root / f"whole {kind}")
        worker = [sys.executable, str(Path(__file__).with_name("killed_conversion.py")), str(root)]
        ended = subprocess.run(worker, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=150, check=False)
        assert ended.returncode == 0, "a conversion ended before the point at which it was to be killed"
        yield root
    torch.set_num_threads(threads)


def _files(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def _finished(partial: Path) -> dict[str, int]:
    """Weight files whose completion was noted, by the time each was written."""
    journal, files = (partial / "journal.json").read_text(), partial / "files"
    found = (path for path in files.rglob("*") if path.suffix in HELD and f'"{path.name}"' in journal)
    return {str(path.relative_to(files)): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("point", [point for point in POINTS if point not in (CHANGED, *COMPLETE)])
def test_a_killed_conversion_goes_on_to_the_same_end(root: Path, point: str) -> None:
    kind, out = POINTS[point][0], root / str(list(POINTS).index(point))
    assert not out.exists(), "a part under the name of the whole"
    partial = out.with_name(f".{out.name}.partial")
    kept = _finished(partial)
    assert bool(kept) is not any(word in point for word in ("first", "before any"))
    convert(kind, root, out)
    assert not partial.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "a finished file was written again"
    assert _files(out) == _files(root / f"whole {kind}")
    verify(out, strict=True) if kind == "to_hf" else kind == "truncate" or verify_seal(out)


@pytest.mark.parametrize("point", COMPLETE)
def test_what_a_kill_left_beside_a_complete_target_goes(root: Path, point: str) -> None:
    kind, out = POINTS[point][0], root / str(list(POINTS).index(point))
    assert out.with_name(f".{out.name}.partial").is_dir()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    convert(kind, root, out)
    assert not out.with_name(f".{out.name}.partial").exists()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "the complete target was made again"


def test_a_part_of_another_model_is_not_gone_on_with(root: Path) -> None:
    """The source changed between the kill and the second try: nothing of the old one may stay."""
    out = root / str(list(POINTS).index(CHANGED))
    assert _finished(out.with_name(f".{out.name}.partial"))
    from_hf(root / "hf2", out)
    assert diff(root / "hf2", out)["same"] is True
    verify_seal(out)

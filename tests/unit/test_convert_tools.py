"""diff and show: what differs between two models is told exactly, in either format, in blocks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_tools import tensors_of, write_checkpoint, write_directory

from megatron_octo.checkpoint.tensors import read
from megatron_octo.convert import compare
from megatron_octo.convert.compare import diff, format_diff
from megatron_octo.convert.show import format_tree, show
from megatron_octo.errors import CheckpointError, DataError
from megatron_octo.locations import locate

UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The same model as a directory and as a checkpoint."""
    return write_directory(tmp_path / "hf"), write_checkpoint(tmp_path / "checkpoint")


def test_equal_models_are_the_same_in_any_pair_of_formats(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for one, other in (pair, pair[::-1], (pair[0], write_directory(tmp_path / "again")), (pair[1], pair[1])):
        report = diff(one, other)
        assert report["same"] is True
        assert report["summary"]["same"] == report["summary"]["tensors"] == len(report["tensors"])
        assert report["summary"]["differing_elements"] == 0
        assert "bit for bit" in format_diff(report)
    assert len(diff(*pair)["tensors"]) == len(tensors_of())


def test_a_difference_is_measured_and_named_in_the_names_both_have(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = tensors_of()
    original = tensors[UP].clone()
    tensors[UP][3, 5] += 0.5
    tensors[UP][0, 1] -= 0.25
    changed = write_directory(tmp_path / "changed", tensors)
    for base in pair:
        facts = diff(base, changed)["tensors"]
        assert [name for name in facts if not facts[name]["same"]] == [UP]
        gap = (tensors[UP].double() - original.double()).norm() / original.double().norm()
        assert facts[UP]["differing"] == 2
        assert facts[UP]["elements"] == original.numel()
        assert facts[UP]["max_abs"] == pytest.approx(0.5, rel=1e-6)
        assert facts[UP]["relative_l2"] == pytest.approx(float(gap), rel=1e-9)
    other = write_checkpoint(tmp_path / "other", tensors)
    report = diff(pair[1], other)
    named = [name for name, facts in report["tensors"].items() if not facts["same"]]
    assert named == ["decoder.layers.1.mlp.linear_fc1.weight"]
    assert "2 of 768 elements, max 0.5" in format_diff(report)
    assert report["same"] is False


def test_bits_count_and_not_only_values(tmp_path: Path) -> None:
    norm = "model.norm.weight"
    one, other = tensors_of(), tensors_of()
    one[norm][:3] = other[norm][:3] = torch.tensor([0.0, torch.nan, torch.inf])
    assert diff(write_directory(tmp_path / "a", one), write_directory(tmp_path / "b", other))["same"] is True
    other[norm][:3] = torch.tensor([-0.0, 1.0, 1.0])
    facts = diff(tmp_path / "a", write_directory(tmp_path / "c", other))["tensors"][norm]
    assert (facts["differing"], facts["not_finite"], facts["max_abs"], facts["relative_l2"]) == (3, 2, 0.0, 0.0)
    json.dumps(facts, allow_nan=False)


def test_another_dtype_is_told_with_what_it_cost(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of().items()}
    report = diff(write_directory(tmp_path / "a"), write_directory(tmp_path / "b", tensors))
    facts, original = report["tensors"][UP], tensors_of()[UP]
    assert facts["dtype"] == ["float32", "bfloat16"]
    assert facts["differing"] == int((original != tensors[UP].float()).sum()) > 0
    assert facts["max_abs"] == float((original.double() - tensors[UP].double()).abs().max())
    exact = write_directory(tmp_path / "c", {name: tensor.float() for name, tensor in tensors.items()})
    facts = diff(tmp_path / "b", exact)["tensors"][UP]
    assert (facts["same"], facts["differing"], facts["dtype"]) == (False, 0, ["bfloat16", "float32"])


def test_missing_tensors_and_other_shapes_are_listed(tmp_path: Path) -> None:
    one, other = tensors_of(), tensors_of()
    del one[UP]
    other["model.norm.weight"] = torch.ones(4)
    other["extra"] = torch.ones(2)
    report = diff(write_directory(tmp_path / "a", one), write_directory(tmp_path / "b", other))
    assert (report["only_a"], set(report["only_b"])) == ([], {UP, "extra"})
    assert report["tensors"]["model.norm.weight"] == {"same": False, "shape": [[16], [4]]}
    assert report["summary"]["missing"] == 2
    assert report["summary"]["different"] == 1
    text = format_diff(report)
    assert "only in b: extra" in text
    assert "shape [16] against [4]" in text
    with pytest.raises(DataError, match=r"do not cover the model: missing decoder"):
        diff(write_checkpoint(tmp_path / "c", dropped="decoder.layers.1.mlp.linear_fc2.weight"), tmp_path / "a")


def test_a_tied_head_that_one_side_writes_out_is_held_against_the_embedding(pair: tuple[Path, Path], tmp_path) -> None:
    tensors = {**tensors_of(), HEAD: tensors_of()[EMBEDDING]}
    written = write_directory(tmp_path / "written", tensors)
    for base in pair:
        assert diff(base, written)["same"] is diff(written, base)["same"] is True
    tensors[HEAD] = tensors[HEAD] + 1
    changed = write_directory(tmp_path / "changed", tensors)
    for base in pair:
        facts = diff(base, changed)["tensors"]
        assert [name for name in facts if not facts[name]["same"]] == [HEAD]


def test_equal_tensors_in_another_architecture_are_not_the_same_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_directory(tmp_path / "other", rms_norm_eps=1e-6)
    for base in pair:
        report = diff(base, other)
        assert report["summary"]["different"] == report["summary"]["missing"] == 0
        assert report["same"] is False
        assert report["config"] == ["norm_epsilon: 1e-05 -> 1e-06"]
        assert "norm_epsilon" in format_diff(report)


def test_an_unknown_architecture_is_compared_under_its_own_names(tmp_path: Path) -> None:
    one = write_directory(tmp_path / "a", model_type="mamba")
    report = diff(one, write_directory(tmp_path / "b", model_type="mamba"))
    assert report["config"] is None
    assert report["summary"]["same"] == len(tensors_of())
    assert "config: not compared" in format_diff(report)


def test_blocks_of_any_size_give_one_report(pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    tensors = {name: tensor + 0.01 * (name == UP) for name, tensor in tensors_of().items()}
    changed = write_directory(tmp_path / "changed", tensors)
    whole = diff(pair[1], changed)
    longest = []

    def recorded(source, name, start, count):
        rows = read(source, name, start, count)
        longest.append(rows.nbytes)
        return rows

    monkeypatch.setattr(compare, "_BLOCK_BYTES", 256)
    monkeypatch.setattr(compare, "read", recorded)
    parts = diff(pair[1], changed)
    assert max(longest) <= 256
    assert parts["tensors"][UP].pop("relative_l2") == pytest.approx(whole["tensors"][UP].pop("relative_l2"), rel=1e-12)
    assert parts == whole


def test_many_differences_are_cut_short_for_people(pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    tensors = {name: tensor + 1 for name, tensor in tensors_of().items()}
    report = diff(pair[0], write_directory(tmp_path / "changed", tensors))
    monkeypatch.setattr(compare, "_LINES", 3)
    lines = format_diff(report).splitlines()
    assert lines[-1] == f"  and {len(tensors) - 3} more, see --json"
    shown = [float(line.rpartition("relative ")[2]) for line in lines[3:6]]
    assert shown == sorted(shown, reverse=True)


def test_show_tells_both_formats_without_reading_a_value(pair: tuple[Path, Path]) -> None:
    directory, checkpoint = pair
    report = show(directory)
    assert report["format"] == "hugging_face"
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors_of().values())
    assert report["bytes"] == 4 * report["parameters"]
    assert report["tensors"][EMBEDDING] == {"shape": [40, 16], "dtype": "float32", "bytes": 2560}
    for path in checkpoint.glob("*.distcp"):
        path.unlink()
    report = show(checkpoint)
    assert report["format"] == "torch_dist"
    assert report["tensors"]["embedding.word_embeddings.weight"]["shape"] == [128, 16]
    assert report["lineage"]["tokens"] == 70
    tree = format_tree(report)
    assert "decoder.layers.*.self_attention.linear_qkv.weight" in tree
    assert "x 2" in tree


def test_show_of_a_run_is_that_of_its_latest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        write_checkpoint(run / "checkpoints" / f"step_{step:08d}")
    assert show(run)["path"].endswith("step_00000002")
    with pytest.raises(CheckpointError, match="no such directory"):
        show(tmp_path / "nothing")


def test_show_and_diff_read_urls(pair: tuple[Path, Path]) -> None:
    there = locate("memory://tools/model")
    for path in pair[0].iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    assert show(there)["tensors"] == show(pair[0])["tensors"]
    assert diff(there, pair[1])["same"] is True
    there.fs.rm("/tools", recursive=True)


def test_show_of_a_directory_needs_no_torch(pair: tuple[Path, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_octo.convert.show import show; "
        f"show(Path({str(pair[0])!r})); "
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


def test_pickled_weights_are_not_opened_to_be_shown(pair: tuple[Path, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pair[0], tmp_path / "pickled"))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    for tool in (show, lambda path: diff(path, pair[1])):
        with pytest.raises(DataError, match="pickled weights"):
            tool(directory)

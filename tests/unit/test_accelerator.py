"""What a machine can run is decided from facts: those of other machines are handed in, this one's are gathered."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
from precision_tools import RUN

from megatron_octo.config.run import RunConfig
from megatron_octo.errors import EnvironmentProblem
from megatron_octo.runtime import accelerator
from megatron_octo.runtime.accelerator import Machine, check, choose_layers, choose_optimizer, look, notes
from megatron_octo.runtime.tp_overlap import buffers

H100 = Machine(gpus=8, capability=(9, 0), cuda=(13, 0), transformer_engine="2.11.0", apex="nvidia")
PLAIN_GPU = replace(H100, transformer_engine=None, apex=None)


def run(**changes: object) -> RunConfig:
    return RunConfig.model_validate({**RUN, "fp8": None, **changes})


def optimizer(name: str) -> RunConfig:
    return run(optimizer={"implementation": name})


def test_a_hopper_machine_runs_everything():
    for recipe in ("delayed", "tensorwise", "blockwise"):
        check(run(fp8={"recipe": recipe}), H100)
    for name in ("auto", "transformer_engine", "apex", "torch"):
        check(optimizer(name), H100)


def test_auto_takes_the_best_that_is_there():
    assert choose_layers(run(), H100) == "transformer_engine"
    assert choose_layers(run(), PLAIN_GPU) == choose_layers(run(), Machine()) == "local"
    assert choose_layers(run(transformer_impl="local"), H100) == "local"
    assert choose_optimizer(run(), H100) == "transformer_engine"
    assert choose_optimizer(run(), replace(H100, transformer_engine=None)) == "apex"
    assert choose_optimizer(run(), replace(PLAIN_GPU, apex="impostor")) == "torch"
    assert choose_optimizer(run(), replace(PLAIN_GPU, apex="unbuilt")) == "torch"
    assert choose_optimizer(run(), Machine(transformer_engine="2.11.0", apex="nvidia")) == "torch"
    assert choose_optimizer(optimizer("torch"), H100) == "torch"


REFUSED = {
    "fp8 on a CPU": (run(fp8={}), Machine(), "^fp8 cannot run.*torch sees none"),
    "fp8 on Ampere": (run(fp8={}), replace(H100, capability=(8, 0)), "compute capability 8.0 .* 9.0"),
    "fp8 without its library": (run(fp8={}), PLAIN_GPU, "TransformerEngine is not installed.*fix: pip install"),
    "fp8 with an old library": (run(fp8={}), replace(H100, transformer_engine="2.8.1"), r"2.8.1 .* >= 2.9, < 2.12"),
    "fp8 with a new library": (run(fp8={}), replace(H100, transformer_engine="2.12.0"), r"2.12.0 .* < 2.12"),
    "a library of unknown version": (run(fp8={}), replace(H100, transformer_engine="of unknown version"), "unknown"),
    "a library that fails": (run(fp8={}), replace(H100, te_fault="ImportError: libcudnn"), "does not load .*libcudnn"),
    "blocks before CUDA 12.9": (run(fp8={"recipe": "blockwise"}), replace(H100, cuda=(12, 8)), "12.8 .* 12.9"),
    "layers": (run(transformer_impl="transformer_engine"), Machine(), "^transformer_impl: transformer_engine cannot"),
    "overlap": (
        run(parallel={"tensor": 2, "sequence": True, "tp_comm_overlap": True}),
        PLAIN_GPU,
        "^parallel.tp_comm_overlap cannot",
    ),
    "fused Adam on a CPU": (optimizer("transformer_engine"), Machine(), "implementation: transformer_engine .*GPU"),
    "apex on a CPU": (optimizer("apex"), Machine(apex="nvidia"), "apex's fused Adam needs an NVIDIA GPU"),
    "no apex": (optimizer("apex"), PLAIN_GPU, "NVIDIA's apex is not installed"),
    "the impostor": (optimizer("apex"), replace(PLAIN_GPU, apex="impostor"), "unrelated project.*pip uninstall apex"),
    "apex without kernels": (optimizer("apex"), replace(PLAIN_GPU, apex="unbuilt"), "no module amp_C"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason_and_the_way_out(name):
    asked, machine, words = REFUSED[name]
    assert accelerator.asks_for_accelerator(asked)
    with pytest.raises(EnvironmentProblem, match=words) as refused:
        check(asked, machine)
    assert refused.value.exit_code == 6
    assert "fix: " in str(refused.value)


def test_a_plain_run_asks_for_nothing_and_runs_anywhere():
    assert not accelerator.asks_for_accelerator(run())
    check(run(), Machine())


def test_a_gpu_user_hears_of_choices_made_for_them():
    assert notes(run(), Machine(apex="impostor")) == notes(run(), H100) == []
    said = notes(run(), replace(PLAIN_GPU, apex="impostor"))
    assert len(said) == 2
    assert "TransformerEngine is not installed" in said[0]
    assert "unrelated" in said[1]


def test_this_machine_is_looked_at():
    import torch

    seen = look()
    assert seen.gpus == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def holding(tmp_path, monkeypatch, files: list[str]) -> None:
    """Put a package `apex` with these files on the path, as an installation would."""
    for name in ["apex/__init__.py", *files]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "impostor"),
        (["apex/views.py", "apex/ext/__init__.py", "apex/lib/libapex.py"], "impostor"),
        (["apex/optimizers/__init__.py", "apex/optimizers/fused_adam.py"], "unbuilt"),
        (["apex/optimizers/__init__.py", "apex/optimizers/fused_adam.py", "amp_C.py"], "nvidia"),
    ],
)
def test_apex_is_known_by_what_it_holds(tmp_path, monkeypatch, files, found):
    holding(tmp_path, monkeypatch, files)
    assert look().apex == found


def test_an_engine_of_whatever_origin_is_seen_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert look().transformer_engine == "of unknown version"


def test_one_that_does_not_load_says_why(monkeypatch):
    broken = types.ModuleType("transformer_engine")
    monkeypatch.setitem(sys.modules, "transformer_engine", broken)
    assert "No module named" in accelerator._te_fault()


def test_overlap_buffers_hold_a_whole_micro_batch_in_each_precision_that_is_met():
    parallel = {"tensor": 4, "sequence": True, "context": 2, "tp_comm_overlap": True}
    batch = {"global_batch": 8, "micro_batch": 2}
    assert buffers(run(parallel=parallel, batch=batch)) == {"shape": [256, 256], "tp_size": 4, "modes": ["NONE"]}
    for fp8, modes in (
        ({}, ["FP8"]),
        ({"bf16_last_layers": 1}, ["FP8", "NONE"]),
        ({"sentinel": {}}, ["FP8", "NONE"]),
    ):
        assert buffers(run(parallel=parallel, batch=batch, fp8=fp8))["modes"] == modes


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("fp8={}", "octo: error: fp8 cannot run on this machine; TransformerEngine needs an NVIDIA GPU"),
        ("optimizer.implementation=apex", "octo: error: optimizer.implementation: apex cannot run on this machine"),
        ("transformer_impl=transformer_engine", "octo: error: transformer_impl: transformer_engine cannot run"),
    ],
)
def test_the_command_refuses_in_one_line_before_it_starts_or_writes_anything(
    tmp_path, monkeypatch, capsys, asked, words
):
    import torch
    import yaml

    from megatron_octo.cli import root

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: what is refused here may run there")
    out = tmp_path / "out"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "fp8": None, "out": str(out)}))
    monkeypatch.setattr(sys, "argv", ["octo", "train", str(tmp_path / "run.yaml"), asked])
    with pytest.raises(SystemExit) as ended:
        root.main()
    said = capsys.readouterr().err
    assert ended.value.code == 6
    assert said.startswith(words)
    assert said.count("\n") == 1
    assert "; fix: " in said
    assert not out.exists()

"""OpenRLHF's real loop on this machine: PPO over two length stages, a run that fails, a kill and what comes after."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from megatron_octo.config.load import dump_config, parse_config
from megatron_octo.config.rl import RLStageConfig
from megatron_octo.errors import StageFailed
from megatron_octo.rl.run import train_rl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL = {
    "prompts": 4, "samples": 4, "mini_batch_prompts": 2, "micro_batch": 8, "rollout_micro_batch": 16, "max_prompt": 64,
    "template": "world", "actor": {"learning_rate": 1e-3, "entropy": 0.0}, "critic": {"learning_rate": 1e-3},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 30 thousand parameters, with the demo's kind of tokenizer."""
    from safetensors.numpy import save_file

    from megatron_octo.data.index.train_tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("rl") / "model"
    train_tokenizer(["Question: What is 1+1?\nAnswer: 1+1=2. \\boxed{2}"] * 9, 300, path)
    rng, hidden = numpy.random.default_rng(0), SIZES["hidden_size"]
    shapes = {"model.embed_tokens": (300, hidden), "model.norm": (hidden,)}
    for layer in range(SIZES["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{name}": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}.self_attn.{name}_proj": (hidden, hidden) for name in ("q", "o")}
        shapes |= {f"{block}.self_attn.{name}_proj": (hidden // 2, hidden) for name in ("k", "v")}
        shapes |= {f"{block}.mlp.{name}_proj": (64, hidden) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj": (hidden, 64)}
    weights = {
        f"{name}.weight": (numpy.ones(shape) if "norm" in name else rng.normal(0, 0.1, shape)).astype(numpy.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "intermediate_size": 64}
    more = {"max_position_embeddings": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config | more | SIZES | special))
    (path / "generation_config.json").write_text(json.dumps(special))
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    rows = [{"id": str(n), "question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage(values: dict, runs: dict[str, tuple[Path, Path]], problems: Path) -> RLStageConfig:
    listed = {label: {"model": str(m), "out": str(o), "problems": str(problems)} for label, (m, o) in runs.items()}
    return parse_config(RLStageConfig, {"rl": SMALL | values, "runs": listed, "timeout_minutes": 9}, "rl.yaml")


def certified(model: Path) -> dict:
    return {"self_sha256": "0" * 64}


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def twin_processes(owner: int) -> list[str]:
    """Command lines of everything that works for the stage process `owner`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue
        if f"octo-ray-{owner}-" in words:
            found.append(words)
    return found


def test_ppo_over_two_lengths_beside_a_broken_run(model: Path, problems: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    broken = tmp_path / "broken-model"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    values = {"length_stages": [{"rollouts": 2, "max_response": 12}, {"rollouts": 1, "max_response": 20}]}
    both = {"good": (model, tmp_path / "good"), "broken": (broken, tmp_path / "bad")}
    with pytest.raises(StageFailed, match=r"broken: \w*Error") as failure:
        train_rl(stage(values, both, problems), certify=certified)
    assert "good:" not in str(failure.value)
    assert not twin_processes(os.getpid())
    assert not (tmp_path / "bad" / "model").exists() and not (tmp_path / "bad" / "done.json").exists()
    assert any((tmp_path / "good" / "ray-logs").iterdir())

    lines = metrics(tmp_path / "good")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["length_stage"] for line in lines] == [0, 0, 1]
    assert all(line["response_length"] <= length for line, length in zip(lines, (12, 12, 20), strict=True))
    expected = {"reward", "truncated", "policy_loss", "critic_loss", "entropy", "format", "seconds"}
    assert all(expected <= line.keys() for line in lines)
    assert all(line["reward_errors"] == 0 for line in lines)

    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "good" / "model"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    config = [json.loads((path / "config.json").read_text()) for path in (model, tmp_path / "good" / "model")]
    assert config[0] == config[1]

    started = time.monotonic()
    done = train_rl(stage(values, {"good": both["good"]}, problems), certify=certified)
    assert done["good"]["rollouts"] == 3 and time.monotonic() - started < 5


_CHILD = """
import sys
from pathlib import Path
from megatron_octo.config.load import load_config
from megatron_octo.config.rl import RLStageConfig
from megatron_octo.rl.run import train_rl
train_rl(load_config(RLStageConfig, Path(sys.argv[1])), certify=lambda model: {"self_sha256": "0" * 64})
"""


def test_a_killed_stage_leaves_nothing_and_goes_on(model: Path, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "long"
    values = {"algorithm": "grpo", "rollouts": 8, "max_response": 12, "checkpoint_rollouts": 1}
    config = stage(values, {"long": (model, out)}, problems)
    dump_config(config, tmp_path / "rl.yaml")
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(tmp_path / "rl.yaml")])
    try:
        deadline = time.monotonic() + 240
        while len(metrics(out)) < 3:
            assert child.poll() is None and time.monotonic() < deadline, "no rollout was made"
            time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    deadline = time.monotonic() + 30
    while twin_processes(child.pid):
        assert time.monotonic() < deadline, twin_processes(child.pid)
        time.sleep(0.2)
    first = metrics(out)[0]

    done = train_rl(config, certify=certified)
    assert done["long"]["rollouts"] == 8
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0] == first, "the run began again where it could have gone on"
    assert not list(Path("/tmp").glob(f"octo-ray-{child.pid}-*")), "the killed stage's directory is still there"

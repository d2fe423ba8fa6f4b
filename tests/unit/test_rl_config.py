"""Rules of a reinforcement stage's configuration."""

from __future__ import annotations

import pytest

from megatron_octo.config.load import parse_config
from megatron_octo.config.rl import RLConfig, RLStageConfig
from megatron_octo.errors import ConfigError


def rl(**values) -> RLConfig:
    return parse_config(RLConfig, values, "rl.yaml")


def stage(values: dict, target: str = "cpu", **overrides) -> RLStageConfig:
    run = {"model": "m", "out": "o", "problems": "p.jsonl", "overrides": overrides}
    return parse_config(RLStageConfig, {"rl": values, "runs": {"long": run}, "target": target}, "rl.yaml")


SMALL = {"prompts": 16, "samples": 8, "mini_batch_prompts": 8, "rollouts": 3, "max_response": 40}


def test_defaults_are_the_papers() -> None:
    config = rl()
    assert (config.prompts, config.samples, config.mini_batch_prompts) == (128, 16, 64)
    assert config.train_batch == 1024 and config.updates_per_rollout == 2
    assert config.actor.learning_rate == 1e-6 and config.kl == 0 and config.temperature == 1
    assert [(one.rollouts, one.max_response) for one in config.stages] == [(100, 2048), (60, 4096), (40, 8192)]
    # 400 gradient updates, 25,600 prompts: three epochs of 8,523 problems
    assert config.total_rollouts * config.updates_per_rollout == 400
    assert config.total_rollouts * config.prompts == 25_600


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompts": 16, "mini_batch_prompts": 32}, "does not divide"),
        ({"prompts": 16, "mini_batch_prompts": 6}, "does not divide"),
        ({**SMALL, "algorithm": "grpo", "samples": 1}, "group of one"),
        ({"rollouts": 3}, "belong together"),
        ({"max_response": 3}, "belong together"),
        ({**SMALL, "length_stages": [{"rollouts": 1, "max_response": 2}]}, "not both"),
        ({"length_stages": []}, "length_stages"),
        ({"length_stages": [{"rollouts": 0, "max_response": 2}]}, "greater than 0"),
        ({"minibatch_prompts": 8}, "mini_batch_prompts"),
        ({"actor": {"learning_rate": 0}}, "greater than 0"),
        ({"kl": -0.1}, "greater than or equal"),
        ({"algorithm": "dpo"}, "ppo"),
        ({"placement": {"gpus_per_node": 8, "engines": 4}}, "engines x engine_tensor = 4"),
    ],
)
def test_broken_rules_are_named(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rl(**values)


def test_a_run_may_differ() -> None:
    config = stage(SMALL, max_response=84, **{"actor.learning_rate": 3e-4})
    resolved = config.resolved("long")
    assert resolved.max_response == 84 and resolved.rollouts == 3
    assert resolved.actor.learning_rate == 3e-4 and config.rl.actor.learning_rate == 1e-6


def test_an_override_is_checked_like_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"runs.long.*samplez.*samples"):
        stage(SMALL, samplez=3).resolved("long")
    with pytest.raises(ConfigError, match="does not divide"):
        stage(SMALL, mini_batch_prompts=5).resolved("long")


def test_batches_fit_the_processes() -> None:
    stage({**SMALL, "micro_batch": 64}).resolved("long")
    with pytest.raises(ConfigError, match="64 responses are not divisible by micro_batch 48 x 1"):
        stage({**SMALL, "micro_batch": 48}).resolved("long")
    with pytest.raises(ConfigError, match="micro_batch 16 x 8 processes = 128"):
        stage({**SMALL, "micro_batch": 16}, target="cluster").resolved("long")
    with pytest.raises(ConfigError, match="make 1 passes for 8 processes"):
        stage({**SMALL, "micro_batch": 8, "rollout_micro_batch": 128}, target="cluster").resolved("long")


def test_the_cpu_draws_from_everything() -> None:
    stage(SMALL | {"top_p": 0.9, "micro_batch": 8}, target="cluster").resolved("long")
    with pytest.raises(ConfigError, match="top_p = 0.9"):
        stage(SMALL | {"top_p": 0.9}).resolved("long")


def test_two_runs_need_two_directories() -> None:
    run = {"model": "m", "out": "o", "problems": "p"}
    with pytest.raises(ConfigError, match="two runs write to one directory"):
        parse_config(RLStageConfig, {"runs": {"a": run, "b": run}}, "rl.yaml")

"""Argument vectors against OpenRLHF's real parser and its real rules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_octo.config.load import parse_config
from megatron_octo.config.rl import RLStageConfig
from megatron_octo.errors import ConfigError, EnvironmentProblem
from megatron_octo.rl import argv, parser

SMALL = {"prompts": 16, "samples": 8, "mini_batch_prompts": 8, "rollouts": 25, "max_response": 40, "max_prompt": 64}


def stage(values: dict, target: str, out: str = "/out") -> RLStageConfig:
    run = {"model": "/models/long", "out": out, "problems": "/problems.jsonl"}
    return parse_config(RLStageConfig, {"rl": values, "runs": {"long": run}, "target": target}, "rl.yaml")


def parsed(values: dict, target: str, number: int = 0):
    return parser.parse(argv.run_vectors(stage(values, target), "long")[number])


CASES = [
    (values | {"algorithm": algorithm}, target)
    for algorithm in ("ppo", "grpo")
    for values, target in (({}, "cluster"), (SMALL, "cpu"), ({"kl": 0.01, "actor": {"entropy": 0.0}}, "cluster"))
]


@pytest.mark.parametrize(("values", "target"), CASES)
def test_every_flag_is_a_complete_option(values: dict, target: str) -> None:
    known = parser.options()
    for command in argv.commands(stage(values, target)):
        assert command[:3] == ["python", "-m", "openrlhf.cli.train_ppo_ray"]
        flags = [part for part in command if part.startswith("--")]
        assert set(flags) <= set(known) and len(flags) == len(set(flags))


def test_the_parser_is_openrlhfs() -> None:
    options = parser.options()
    assert len(options) > 150
    assert options["--rollout.batch_size"].default == 1024
    assert options["--ckpt.load_enable"].nargs == 0


def test_batches_count_responses() -> None:
    args = parsed({}, "cluster")
    assert args.rollout.batch_size == 128 and args.rollout.n_samples_per_prompt == 16
    assert args.train.batch_size == 64 * 16 == 1024
    assert args.rollout.batch_size * args.rollout.n_samples_per_prompt // args.train.batch_size == 2


def test_recipe_values_reach_openrlhf() -> None:
    args = parsed({}, "cluster")
    assert args.algo.advantage.estimator == "gae" and args.algo.kl.init_coef == 0
    assert args.algo.advantage.gamma == 1 and args.algo.advantage.lambd == 1
    assert args.actor.adam.lr == 1e-6 and args.critic.adam.lr == 5e-6
    assert args.actor.lr_scheduler == "constant" and args.rollout.temperature == 1
    assert args.data.input_template is None and not args.data.apply_chat_template
    assert args.critic.num_gpus_per_node == args.actor.num_gpus_per_node == 8
    assert args.critic.freezing_steps == -1
    assert args.ds.zero_stage == 3 and args.ds.packing_samples and args.train.colocate_all and args.vllm.enable_sleep


def test_length_stages_follow_each_other() -> None:
    stages = argv.run_files(stage({}, "cluster").rl, Path("/models/long"), Path("/out"))
    args = [parsed({}, "cluster", number) for number in range(3)]
    assert [one.rollout.max_new_tokens for one in args] == [2048, 4096, 8192]
    assert [one.data.max_len for one in args] == [1024 + 2048, 1024 + 4096, 1024 + 8192]
    assert args[0].actor.model_name_or_path == "/models/long" == args[0].critic.model_name_or_path
    for before, after in ((0, 1), (1, 2)):
        assert after == before + 1
        assert args[after].actor.model_name_or_path == args[before].ckpt.output_dir
        assert args[before].critic.save_value_network
        assert args[after].critic.model_name_or_path == args[before].ckpt.output_dir + "_critic"
    assert not args[2].critic.save_value_network
    assert len({one.ckpt.path for one in args}) == len({one.data.prompt_dataset for one in args}) == 3
    assert len({one.name for one in stages}) == 3


def test_critic_warms_up_once() -> None:
    values = {"critic": {"warmup_rollouts": 2}, "length_stages": [{"rollouts": 2, "max_response": 9}] * 2}
    # OpenRLHF trains the policy in steps > freezing_steps, counted from 0: two rollouts stand still
    assert [parsed(values, "cpu", number).critic.freezing_steps for number in (0, 1)] == [1, -1]


def test_grpo_has_no_critic() -> None:
    args = parsed(SMALL | {"algorithm": "grpo"}, "cpu")
    assert args.algo.advantage.estimator == "group_norm" and args.critic.model_name_or_path is None


def test_the_cpu_gets_one_process_for_each_role() -> None:
    args = parsed(SMALL, "cpu")
    assert args.actor.num_gpus_per_node == args.critic.num_gpus_per_node == args.vllm.num_engines == 1
    assert args.vllm.sync_backend == "gloo" and args.ds.attn_implementation == "sdpa" and not args.ds.packing_samples
    assert args.train.batch_size == 64 and args.data.max_len == 104


def test_another_shape_of_the_command_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("train()", 'if __name__ == "__main__":\n    train(None)\n'):
        (tmp_path / "cli.py").write_text(text)
        monkeypatch.setattr(parser, "_source", lambda: tmp_path / "cli.py")
        with pytest.raises(EnvironmentProblem, match=r"does not end in train\(args\)"):
            parser._main_block.__wrapped__()


def test_openrlhfs_own_refusals_come_through() -> None:
    with pytest.raises(ConfigError, match=r"unrecognized arguments: --train.batchsize"):
        parser.parse(["--train.batchsize", "3"])
    with pytest.raises(ConfigError, match="n_samples_per_prompt"):
        parser.parse(["--algo.advantage.estimator", "rloo", "--reward.remote_url", "r.py"])


def test_separators_in_paths_are_refused() -> None:
    with pytest.raises(ConfigError, match="OpenRLHF splits paths there"):
        argv.commands(stage(SMALL, "cpu", out="/tmp/a,b"))


def test_parsing_leaves_no_trace() -> None:
    before = list(sys.argv)
    parsed(SMALL, "cpu")
    assert sys.argv == before
    assert "openrlhf.utils" not in sys.modules or hasattr(sys.modules["openrlhf.utils"], "get_strategy")

"""Configuration -> OpenRLHF 0.11.2 argument vectors, one for each length stage.

Complete dotted names only: the parser would accept a cut-off name, and mean by it whatever it happens to begin.
Sizes in prompts become sizes in responses here and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_octo.config.rl import LengthStage, RLConfig, RLStageConfig
from megatron_octo.errors import ConfigError
from megatron_octo.rl.parser import MODULE, parse

Target = Literal["cpu", "cluster"]
Flags = dict[str, object]


@dataclass(frozen=True)
class StageFiles:
    """Where one length stage of one run reads and writes; all paths absolute.

    Args:
        prompts: prompt file of this stage.
        reward: reward file of the run.
        actor: model the policy starts from.
        critic: model the critic starts from; None means the policy's, with a fresh value head.
        checkpoints: resumable state.
        model: Hugging Face directory written at the end; the critic's is beside it, with `_critic` appended.
        tensorboard: parent of this stage's event directory.
        name: of this stage, below `tensorboard`.
    """

    prompts: Path
    reward: Path
    actor: Path
    critic: Path | None
    checkpoints: Path
    model: Path
    tensorboard: Path
    name: str


def run_files(config: RLConfig, model: Path, out: Path) -> list[StageFiles]:
    """Lay out the length stages of a run below its output directory.

    A later stage starts from the model (and, in PPO, the critic) the one before it exported, with fresh Adam moments:
    OpenRLHF's own resume would carry the prompt position of the old file into the new one and find it exhausted.

    Raises:
        ConfigError: a path holds a character OpenRLHF would take for a separator.
    """
    model, out = model.absolute(), out.absolute()
    for path in (model, out):
        if set(",@") & set(str(path)):
            raise ConfigError(f"{path}: ',' or '@' in a path", "OpenRLHF splits paths there", "use another directory")
    files: list[StageFiles] = []
    for number in range(len(config.stages)):
        stage, before = out / "stages" / str(number), files[-1] if files else None
        files.append(
            StageFiles(
                prompts=out / "prompts.jsonl" if len(config.stages) == 1 else stage / "prompts.jsonl",
                reward=out / "reward.py",
                actor=before.model if before else model,
                critic=critic_model(before.model) if before and config.algorithm == "ppo" else None,
                checkpoints=stage / "checkpoints",
                model=stage / "model",
                tensorboard=out / "tensorboard",
                name=f"stage-{number}",
            )
        )
    return files


def critic_model(model: Path) -> Path:
    """Where OpenRLHF writes the critic that belongs to an exported policy."""
    return model.with_name(model.name + "_critic")


def commands(config: RLStageConfig) -> list[list[str]]:
    """Every command of a stage: for each run in order, for each of its length stages, the whole vector.

    Each has passed OpenRLHF's own parser and validation.

    Raises:
        ConfigError: a rule of ours or of OpenRLHF is broken.
    """
    vectors = [vector for label in config.runs for vector in run_vectors(config, label)]
    return [["python", "-m", MODULE, *vector] for vector in vectors]


def run_vectors(config: RLStageConfig, label: str) -> list[list[str]]:
    """Checked argument vectors of one run, one for each length stage."""
    run, resolved = config.runs[label], config.resolved(label)
    files = run_files(resolved, run.model, run.out)
    vectors = [vector(resolved, number, at, config.target) for number, at in enumerate(files)]
    for arguments in vectors:
        parse(arguments)
    return vectors


def vector(config: RLConfig, number: int, files: StageFiles, target: Target) -> list[str]:
    """The argument vector of length stage `number`, without the program."""
    stage = config.stages[number]
    flags: Flags = {
        **_models(config, files),
        **_data(config, stage, files),
        **_batches(config),
        **_algorithm(config, first=number == 0),
        **_keeping(config, files, last=number == len(config.stages) - 1),
        **(_cpu(config) if target == "cpu" else _cluster(config)),
    }
    return [part for name, value in flags.items() for part in _written(name, value)]


def _models(config: RLConfig, files: StageFiles) -> Flags:
    critic = {"critic.model_name_or_path": files.critic} if files.critic else {}
    return {"actor.model_name_or_path": files.actor, **critic, "reward.remote_url": files.reward}


def _data(config: RLConfig, stage: LengthStage, files: StageFiles) -> Flags:
    return {
        "data.prompt_dataset": files.prompts,
        "data.input_key": "prompt",
        "data.label_key": "label",
        "data.max_len": config.max_prompt + stage.max_response,
        "rollout.max_new_tokens": stage.max_response,
        "rollout.temperature": config.temperature,
        "rollout.top_p": config.top_p,
    }


def _batches(config: RLConfig) -> Flags:
    """`rollout.batch_size` counts prompts, `train.batch_size` responses: 64 prompts of 16 samples are 1024."""
    return {
        "rollout.batch_size": config.prompts,
        "rollout.n_samples_per_prompt": config.samples,
        "rollout.micro_batch_size": config.rollout_micro_batch,
        "train.batch_size": config.train_batch,
        "train.micro_batch_size": config.micro_batch,
        "train.num_episodes": 1,
        "train.max_epochs": 1,
        "train.seed": config.seed,
    }


def _algorithm(config: RLConfig, first: bool) -> Flags:
    actor, critic = config.actor, config.critic
    entropy = {} if actor.entropy is None else {"actor.entropy_coef": actor.entropy}
    flags: Flags = {
        "algo.advantage.estimator": "gae" if config.algorithm == "ppo" else "group_norm",
        "algo.advantage.gamma": config.gamma,
        "algo.advantage.lambd": config.lambd,
        "algo.kl.init_coef": config.kl,
        "actor.eps_clip": actor.eps_clip,
        **entropy,
        **_optimizer("actor", actor.learning_rate, actor.gradient_clip, config),
    }
    if config.algorithm == "ppo":
        flags |= _optimizer("critic", critic.learning_rate, critic.gradient_clip, config)
        # OpenRLHF lets the policy learn in steps greater than this number and counts them from 0.
        flags |= {"critic.value_clip": critic.value_clip, "critic.freezing_steps": critic.warmup_rollouts * first - 1}
    return flags


def _optimizer(role: str, rate: float, clip: float, config: RLConfig) -> Flags:
    return {
        f"{role}.adam.lr": rate,
        f"{role}.lr_scheduler": "constant" if config.warmup_ratio == 0 else "constant_with_warmup",
        f"{role}.lr_warmup_ratio": config.warmup_ratio,
        f"{role}.max_norm": clip,
    }


def _keeping(config: RLConfig, files: StageFiles, last: bool) -> Flags:
    """Two checkpoints are kept: a kill during a save leaves the one before."""
    return {
        "ckpt.path": files.checkpoints,
        "ckpt.save_steps": config.checkpoint_rollouts,
        "ckpt.max_num": 2,
        "ckpt.load_enable": True,
        "ckpt.output_dir": files.model,
        "critic.save_value_network": config.algorithm == "ppo" and not last,
        "logger.tensorboard_dir": files.tensorboard,
        "logger.wandb.run_name": files.name,
    }


def _roles(config: RLConfig, nodes: int, gpus: int) -> Flags:
    roles = ["actor"] + ["critic"] * (config.algorithm == "ppo") + ["ref"] * (config.kl > 0)
    return {f"{role}.{key}": value for role in roles for key, value in _node(nodes, gpus)}


def _node(nodes: int, gpus: int) -> list[tuple[str, int]]:
    return [("num_nodes", nodes), ("num_gpus_per_node", gpus)]


def _cpu(config: RLConfig) -> Flags:
    """One process for each role; `bf16` is what the flag can say, the twin's patches make it fp32."""
    return {
        **_roles(config, 1, 1),
        "vllm.num_engines": 1,
        "vllm.enforce_eager": True,
        "vllm.sync_backend": "gloo",
        "ds.zero_stage": 2,
        "ds.param_dtype": "bf16",
        "ds.attn_implementation": "sdpa",
    }


def _cluster(config: RLConfig) -> Flags:
    place = config.placement
    return {
        **_roles(config, place.nodes, place.gpus_per_node),
        "vllm.num_engines": place.engines,
        "vllm.tensor_parallel_size": place.engine_tensor,
        "vllm.gpu_memory_utilization": place.gpu_memory_utilization,
        "vllm.enable_prefix_caching": True,
        "vllm.enable_sleep": place.colocate,
        "train.colocate_all": place.colocate,
        "ds.enable_sleep": place.colocate,
        "ds.zero_stage": place.zero_stage,
        "ds.param_dtype": config.dtype,
        "ds.adam_offload": place.adam_offload,
        "ds.packing_samples": place.packing,
        "ds.attn_implementation": "flash_attention_2" if place.packing else "sdpa",
        "actor.gradient_checkpointing_enable": place.gradient_checkpointing,
    }


def _written(name: str, value: object) -> list[str]:
    """A switch is present or absent; everything else is a name and a value."""
    if value is True or value is False:
        return [f"--{name}"] * value
    return [f"--{name}", json.dumps(value) if isinstance(value, float) else str(value)]

"""The demo's tree, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_octo.campaign.api import campaign_stages, run_campaign
from megatron_octo.campaign.stages import expand, write_settings
from megatron_octo.campaign.state import settle_config
from megatron_octo.config.campaign import CampaignConfig
from megatron_octo.config.load import load_config, parse_config
from megatron_octo.config.recipes import RECIPES, find_recipe
from megatron_octo.config.rl import RLStageConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError

DEMO = Path("recipes/campaigns/demo.yaml")
BRANCH = "{tokens: 10K, mixture: {web: 1}, max_new_tokens: 10}"


def demo(*overrides: str) -> CampaignConfig:
    return load_config(CampaignConfig, find_recipe(DEMO, "campaigns"), list(overrides))


def test_tree(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in expand(demo(), tmp_path, 2)}
    assert list(stages) == [
        "data", "stable-1", "stable-2", "long", "short", "hybrid", "convert", "evaluate-base", "rl", "evaluate-rl",
        "report",
    ]  # fmt: skip
    assert stages["stable-2"].needs == ("stable-1",)
    assert all(stages[name].needs == ("stable-2",) for name in ("long", "short", "hybrid"))
    assert stages["stable-1"].cores == 4
    for number, stage in enumerate(stages.values()):
        assert set(stage.needs) <= set(list(stages)[:number]), "needed stages come first"


def test_branches_fork_where_the_stable_stage_ends(tmp_path: Path) -> None:
    config = demo("stable.tokens=500001")
    write_settings(expand(config, tmp_path, 2))
    stable = load_config(RunConfig, tmp_path / "stages" / "stable-2.yaml")
    layouts = set()
    for name in config.branches:
        branch = load_config(RunConfig, tmp_path / "stages" / f"{name}.yaml")
        assert branch.start.fork is not None
        assert branch.start.fork.at == stable.steps * stable.tokens_per_step
        assert branch.start.fork.parent == stable.out
        assert branch.schedule.learning_rate == stable.schedule.learning_rate
        layouts.add(branch.parallel.label)
    assert len(layouts) == 3, "every branch proves another resharding"


def test_legs_share_one_run_directory(tmp_path: Path) -> None:
    write_settings(expand(demo(), tmp_path, 2))
    first, second = (load_config(RunConfig, tmp_path / "stages" / f"stable-{leg}.yaml") for leg in (1, 2))
    assert first.out == second.out
    assert first.model_copy(update={"parallel": second.parallel}) == second


def test_the_seed_reaches_every_stage(tmp_path: Path) -> None:
    write_settings(expand(demo("seed=7"), tmp_path, 2))
    for name in ("data", "stable-1", "evaluate-base"):
        assert "seed: 7\n" in (tmp_path / "stages" / f"{name}.yaml").read_text(), name


def test_a_campaign_without_rl_ends_with_its_evaluation(tmp_path: Path) -> None:
    names = [stage.name for stage in expand(demo("rl=null"), tmp_path, 2)]
    assert names[-2:] == ["evaluate-base", "report"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("brances={}", ["brances", "'branches'"]),
        ("branches.long.mixtur={}", ["mixtur", "'mixture'"]),
        ("branches.long.parallel.tensor=3", ["stage 'long'", "parallel.tensor = 3", "model.heads = 4"]),
        ("branches.long.parallel.data=3", ["global_batch", "not divisible"]),
        ("branches.short.mixture.shrot_cot=0.5", ["shrot_cot"]),
        ("stable.mixture={nowhere: 1}", ["nowhere"]),
        ("branches.long.mixture.web=0.95", ["long.mixture", "sum to 1, these to 1.5; scaled", "long_cot: 0.333333333"]),
        ("branches.stable={}", ["stable"]),
        (f"branches.convert={BRANCH}", ["'convert'", "the campaign itself"]),
        (f"branches.stable-1={BRANCH}", ["'stable-1'", "the campaign itself"]),
        (f"branches={{v1.0: {BRANCH}}}", ["'v1.0'", "letters"]),
        ("template=wrold", ["'wrold'", "'world'"]),
        ("rl.micro_batch=48", ["runs.long", "not divisible by micro_batch 48"]),
        ("rl.top_p=0.9", ["runs.long", "top_p"]),
        ("data.problems.heldout=null", ["data.problems.heldout"]),
        ("data.problems.train=null", ["data.problems.train"]),
        ("evaluation.samples=0", ["evaluation.samples"]),
        ("stable.legs=[{until: 900K}, {}]", ["until"]),
        ("model.vocabulary=300", ["440", "300"]),
        ("stable.tokens=many", ["'many'"]),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(demo(override), tmp_path, 2)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not any(tmp_path.iterdir())


def test_other_settings_need_another_directory(tmp_path: Path) -> None:
    settle_config(tmp_path, demo())
    with pytest.raises(ConfigError, match="branches.long.mixture.web: 0.45 -> 0.4;"):
        run_campaign(DEMO, tmp_path, ["branches.long.mixture.web=0.40", "branches.long.mixture.instruction=0.10"])


def test_status_of_a_fresh_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a campaign directory"):
        campaign_stages(tmp_path)
    settle_config(tmp_path, demo())
    assert {state.status for _, state in campaign_stages(tmp_path)} == {"waiting"}
    assert [path.name for path in tmp_path.iterdir()] == ["campaign.yaml"], "asking changes nothing"


def test_length_stages_keep_their_lengths(tmp_path: Path) -> None:
    """A branch's own answer length belongs to a run of one length; the recipe's stages state theirs."""
    stages = {stage.name: stage for stage in expand(demo("rl.rollouts=null", "rl.max_response=null"), tmp_path, 2)}
    config = parse_config(RLStageConfig, stages["rl"].settings, "rl")
    assert [stage.max_response for stage in config.resolved("long").stages] == [2048, 4096, 8192]


def test_every_recipe_loads() -> None:
    recipes = sorted((RECIPES / "campaigns").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_config(CampaignConfig, recipe)

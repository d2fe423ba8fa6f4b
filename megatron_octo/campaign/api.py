"""The calls behind `octo campaign` and `octo demo`."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_octo.campaign.engine import Engine
from megatron_octo.campaign.machine import gpus, record_machine
from megatron_octo.campaign.stages import Stage, expand, write_settings
from megatron_octo.campaign.state import StageState, exclusive, read_state, settle_config
from megatron_octo.config.campaign import CampaignConfig
from megatron_octo.config.load import load_config
from megatron_octo.config.recipes import find_recipe
from megatron_octo.errors import ConfigError
from megatron_octo.files import is_held


def run_campaign(path: Path, out: Path | None = None, overrides: list[str] | None = None) -> Path:
    """Run a campaign to its end, or go on with one that was interrupted.

    Args:
        path: campaign file; a path under `recipes/` is found in the package when it does not exist here.
        out: campaign directory; `runs/<name>` when not given.
        overrides: `dotted.key=value` strings.

    Returns:
        The campaign directory.

    Raises:
        OctoError: bad settings, a directory in use or of another campaign, a failed stage.
    """
    config = load_config(CampaignConfig, find_recipe(path, "campaigns"), overrides)
    out = (out or Path("runs") / config.name).resolve()
    cores = _cores()
    stages = expand(config, out, cores)
    with exclusive(out):
        settle_config(out, config)
        write_settings(stages)
        record_machine(out)
        Engine(out, stages, cores).run()
    return out


def campaign_stages(out: Path) -> list[tuple[Stage, StageState]]:
    """The stages of a campaign directory and where each stands; one left 'running' by a killed campaign is 'waiting'.

    Raises:
        ConfigError: not a campaign directory.
    """
    if not (out / "campaign.yaml").exists():
        raise ConfigError(f"{out}: not a campaign directory", "it has no campaign.yaml", "name the --out of a campaign")
    config = load_config(CampaignConfig, out / "campaign.yaml")
    alive = is_held(out)
    found = []
    for stage in expand(config, out.resolve(), _cores()):
        state = read_state(out, stage.name)
        if state.status == "running" and not alive:
            state.status = "waiting"
        found.append((stage, state))
    return found


def _cores() -> int:
    """How many cores stages may share; 1 where there are GPUs: each stage counts them from 0, so they take turns."""
    return 1 if gpus() else len(os.sched_getaffinity(0))

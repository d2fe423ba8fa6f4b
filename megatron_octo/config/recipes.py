"""The YAML files that come with the package, and how a path under `recipes/` names one of them."""

from __future__ import annotations

import difflib
from pathlib import Path

from megatron_octo.errors import ConfigError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
"""`models/`, `mixtures/`, `runs/`, `campaigns/`, `builds/`, `curation/` and `prompts/`."""


def packaged(path: Path) -> Path | None:
    """The packaged file that a relative path such as `recipes/runs/NAME.yaml` names, if there is one."""
    if path.is_absolute() or ".." in path.parts:
        return None
    found = RECIPES / Path(*[part for part in path.parts if part != "recipes"])
    return found if found.is_file() else None


def find_recipe(path: Path, kind: str) -> Path:
    """The file itself, or the packaged recipe of that name.

    Args:
        path: as a user names it.
        kind: the folder of recipes that is meant: "runs", "campaigns".

    Raises:
        ConfigError: neither is there; the message names the packaged ones spelt most alike.
    """
    found = path if path.exists() else packaged(path)
    if found is not None:
        return found
    names = {recipe.name: f"recipes/{kind}/{recipe.name}" for recipe in sorted((RECIPES / kind).glob("*.yaml"))}
    near = [names[name] for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.0)]
    raise ConfigError(
        f"{path}: no such file", f"{kind} that come with the package: {', '.join(near)}", "check the path"
    )

"""OpenRLHF's own argument parser and its own cross-argument rules, without Ray, vLLM, DeepSpeed or torch.

Both live in the `__main__` block of its command line module, behind imports that need a GPU machine. The block is
taken from the syntax tree and run alone: 0.3 s, and exactly the code a cluster would run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import os
import sys
import threading
import types
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from megatron_octo.errors import ConfigError, EnvironmentProblem

MODULE = "openrlhf.cli.train_ppo_ray"
_lock = threading.Lock()


def options() -> dict[str, argparse.Action]:
    """Every option OpenRLHF's parser knows, by its complete name ("--train.batch_size")."""
    parser, _ = _run(["--reward.remote_url", "reward.py", "--vllm.num_engines", "1"])
    return {name: action for action in parser._actions for name in action.option_strings if name.startswith("--")}


def parse(arguments: list[str]) -> Any:
    """Parse and validate an argument vector as OpenRLHF itself would.

    Args:
        arguments: the vector, without the program's name.

    Returns:
        OpenRLHF's nested namespace (`args.train.batch_size` ...), after its own defaults and rules.

    Raises:
        ConfigError: OpenRLHF refuses it, with OpenRLHF's own words.
        EnvironmentProblem: OpenRLHF is not installed or its command line changed its shape.
    """
    return _run(arguments)[1]


def _run(arguments: list[str]) -> tuple[argparse.ArgumentParser, Any]:
    complaint = io.StringIO()
    with _lock, _light_utils(), contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
        saved, sys.argv = sys.argv, ["train_ppo_ray", *arguments]
        try:
            return _main_block()()
        except SystemExit:
            text = " ".join(complaint.getvalue().split("error:")[-1].split())
            raise ConfigError(f"OpenRLHF refuses its arguments: {text}") from None
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"OpenRLHF refuses its arguments: {error}") from None
        finally:
            sys.argv = saved


@cache
def _main_block() -> Any:
    path = _source()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    if not blocks or ast.unparse(blocks[-1].body[-1]) != "train(args)":
        raise EnvironmentProblem(f"{path} does not end in train(args)", fix="install openrlhf==0.11.2")
    function = ast.parse("def block(): return parser, args").body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = [*blocks[-1].body[:-1], *function.body]
    module = ast.fix_missing_locations(ast.Module([function], []))
    names: dict[str, Any] = {"argparse": argparse, "os": os, "datetime": datetime}
    exec(compile(module, str(path), "exec"), names)
    return names["block"]


def _source() -> Path:
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        raise EnvironmentProblem("OpenRLHF is not installed", fix="pip install --no-deps openrlhf==0.11.2")
    return Path(package.submodule_search_locations[0]) / "cli" / "train_ppo_ray.py"


@contextlib.contextmanager
def _light_utils() -> Any:
    """Let the block import `openrlhf.utils.config` without the package's own start, which wants torch."""
    if "openrlhf.utils" in sys.modules:
        yield
        return
    bare = types.ModuleType("openrlhf.utils")
    bare.__path__ = [str(_source().parents[1] / "utils")]  # a package whose __init__ has not run
    sys.modules["openrlhf.utils"] = bare
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("openrlhf.utils")]:
            del sys.modules[name]

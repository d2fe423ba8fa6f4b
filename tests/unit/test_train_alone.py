"""A run with one replica: nothing is sent to itself, and nothing changes by that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer

from megatron_octo.runtime import groups
from megatron_octo.train import setup
from megatron_octo.train.api import load_run
from megatron_octo.train.hooks.base import Hooks
from megatron_octo.train.step import train_step

DISTRIBUTED = Path(__file__).resolve().parents[1] / "distributed"


@pytest.fixture
def run_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.syspath_prepend(str(DISTRIBUTED))
    import tiny_run

    return tiny_run.write_run(tmp_path)


def train(run_file: Path, name: str, *overrides: str) -> tuple[list[float], int]:
    """Losses and gradient norms of three steps, and how many bytes of gradients and weights were sent."""
    run = load_run(run_file, [f"out={run_file.parent / name}", *overrides])
    run.out.mkdir()
    sent: list[int] = []

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def send(target: torch.Tensor, source: torch.Tensor, **options: Any) -> Any:
            sent.append(source.nbytes)
            return plain(target, source, **options)

        return send

    engine, state = setup.set_up(run, groups.initialize_single(run.seed))
    with pytest.MonkeyPatch.context() as patches:
        for function in ("dist_reduce_scatter_func", "dist_all_gather_func"):
            patches.setattr(param_and_grad_buffer, function, counting(getattr(param_and_grad_buffer, function)))
        facts = [train_step(engine, state, Hooks([], state)) for _ in range(3)]
    groups.shutdown()
    return [number for fact in facts for number in (fact.loss, fact.grad_norm)], sum(sent)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_replica_sends_nothing_to_itself_and_trains_the_same(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    alone, nothing = train(run_file, f"alone-{dtype}", f"dtype={dtype}")
    monkeypatch.setattr(setup, "_keep_to_itself", lambda *_: None)
    plain, something = train(run_file, f"plain-{dtype}", f"dtype={dtype}")
    assert nothing == 0 and something > 0
    assert alone == plain and len(set(alone)) == 6

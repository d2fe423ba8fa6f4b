"""Ranks that do something together: all learn how it went, and none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_octo.errors import OctoError

Answer = TypeVar("Answer")


def on_rank_zero(action: Callable[[], Answer], group: Any = None) -> Answer:
    """Do something on rank 0 only, and give its answer, or raise its error, on every rank.

    Args:
        action: what to do.
        group: all ranks of the run; the default one if not given. A thread beside training needs its own.

    Raises:
        OctoError: as raised on rank 0.
        OSError: as raised on rank 0.
        RuntimeError: rank 0 raised something else; raised on every rank.
    """
    if dist.get_world_size() == 1:
        return action()
    verdict: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            verdict[0] = action()
        except Exception as error:
            verdict[1] = _that_can_travel(error)
    dist.broadcast_object_list(verdict, src=0, group=group)
    if verdict[1] is not None:
        raise verdict[1]
    return verdict[0]


def on_all_ranks(action: Callable[[], Answer], group: Any = None) -> list[Answer]:
    """Do something on every rank, each for itself, and give all answers to rank 0.

    Args:
        action: what to do.
        group: all ranks of the run; the default one if not given.

    Returns:
        On rank 0 the answers in the order of ranks; nothing elsewhere.

    Raises:
        OctoError: a rank raised it; raised on every rank.
        OSError: a rank raised it; raised on every rank.
        RuntimeError: a rank raised something else; raised on every rank.
    """
    try:
        outcome = (action(), None)
    except Exception as error:
        outcome = (None, _that_can_travel(error))
    outcomes: list[Any] = [outcome]
    if dist.get_world_size() > 1:
        outcomes = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(outcome, outcomes or None, dst=0, group=group)
    failed = [error for _, error in outcomes if error is not None]
    verdict = [failed[0] if failed else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(verdict, src=0, group=group)
    if verdict[0] is not None:
        raise verdict[0]
    return [answer for answer, _ in outcomes]


def _that_can_travel(error: Exception) -> Exception:
    """Not all exceptions do: one that nobody expected becomes one that has its cause and says where it was."""
    if isinstance(error, OctoError | OSError):
        return error
    known = RuntimeError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    known.__cause__ = error
    return known

"""What of a schedule may change once a run has taken steps: its future."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.schedule.learning_rate import decay_start, learning_rate


def rewritten_past(before: ScheduleConfig, now: ScheduleConfig, position: int, step_tokens: int) -> str | None:
    """Tell what a changed schedule says otherwise about steps already taken, or about the next one.

    So a stable stretch may become longer or shorter, and a decay that has not begun may move or take another form;
    one that runs can neither be stretched nor left.

    Args:
        before: schedule the steps were taken with.
        now: schedule the run would go on with.
        position: tokens of the run so far.
        step_tokens: tokens of a step.

    Returns:
        The first contradiction in words; None if the change lies in the future and the rate does not jump.
    """
    if now.tokens <= position - step_tokens:
        return f"it would end at {now.tokens} tokens, and {position} are trained"
    for start in _telling(before, now, position, step_tokens):
        was, would_be = learning_rate(before, start), learning_rate(now, start)
        if was != would_be and start < position:
            return f"the step at {start} tokens was taken at {was:.10g}, and would have been at {would_be:.10g}"
        if was != would_be:
            return f"the rate would jump from {was:.10g} to {would_be:.10g} at {position} tokens, where the run stands"
    return None


def _telling(before: ScheduleConfig, now: ScheduleConfig, position: int, step_tokens: int) -> Iterator[int]:
    """Where steps start, up to a position; of those at which both schedules hold their peaks the first and the last.

    A run of millions of steps has spent most of them there.
    """
    decays = [start for start in (decay_start(before), decay_start(now)) if start is not None]
    first = -(-max(before.warmup, now.warmup) // step_tokens) * step_tokens
    last = min(position, *decays) // step_tokens * step_tokens if decays else position
    if last <= first:
        return iter(range(0, position + 1, step_tokens))
    return chain(range(0, first + 1, step_tokens), range(last, position + 1, step_tokens))

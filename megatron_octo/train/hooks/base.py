"""The points around a step where hooks may act, and the list that runs them in order."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from megatron_octo.train.facts import Gradients, StepFacts, Verdict
from megatron_octo.train.state import TrainState


class Hook:
    """What may happen around a step. Subclasses override what they need; all run on every rank.

    What a hook must remember across restarts it keeps in `state.memory[name]`, in JSON's types: it is saved in each
    checkpoint's `run.json` and is there again before `open`.
    """

    def open(self, state: TrainState) -> None:
        """Before the first step."""

    def passes_over(self, state: TrainState) -> str:
        """Before a step: why its batches are passed over; empty if they are not. The same on every rank."""
        return ""

    def before_update(self, state: TrainState, gradients: Gradients) -> Verdict:
        """With all gradients there, before the optimizer uses them: whether it shall.

        The worst verdict of all hooks counts; `Gradients` is the same on every rank, so every rank decides alike. A
        hook that says anything but UPDATE leaves the reason in `state.trouble`.
        """
        return Verdict.UPDATE

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """After each step; `state` has advanced by it."""

    def before_rewind(self, state: TrainState) -> None:
        """Before the run goes back to its last sealed checkpoint; `state` is still that of the bad step."""

    def after_rewind(self, state: TrainState) -> None:
        """After it went back: step, weights, moments and `state.memory` are those of the checkpoint."""

    def finish(self, state: TrainState) -> None:
        """After the last step, if nothing failed."""

    def close(self) -> None:
        """At the very end, whatever happened."""


class Hooks:
    """Runs hooks in order; a context manager that opens them and closes them again."""

    def __init__(self, hooks: list[Hook], state: TrainState) -> None:
        self._hooks, self._state, self._stack = hooks, state, ExitStack()

    def __enter__(self) -> Hooks:
        with ExitStack() as stack:  # closes those that are open if one refuses
            for hook in self._hooks:
                stack.callback(hook.close)
                hook.open(self._state)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def passes_over(self, state: TrainState) -> str:
        """The first hook's reason to pass over the coming step."""
        return next(filter(None, (hook.passes_over(state) for hook in self._hooks)), "")

    def before_update(self, state: TrainState, gradients: Gradients) -> Verdict:
        """Ask each hook; the worst verdict counts."""
        return max((hook.before_update(state, gradients) for hook in self._hooks), default=Verdict.UPDATE)

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Run each hook's `after_step`."""
        for hook in self._hooks:
            hook.after_step(state, facts)

    def before_rewind(self, state: TrainState) -> None:
        """Run each hook's `before_rewind`."""
        for hook in self._hooks:
            hook.before_rewind(state)

    def after_rewind(self, state: TrainState) -> None:
        """Run each hook's `after_rewind`."""
        for hook in self._hooks:
            hook.after_rewind(state)

    def finish(self, state: TrainState) -> None:
        """Run each hook's `finish`."""
        for hook in self._hooks:
            hook.finish(state)

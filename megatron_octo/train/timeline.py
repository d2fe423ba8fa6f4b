"""Where the time of one step goes, part by part: marks set by hooks that exist during that step only.

Time between two marks belongs to what the first one names. On a CPU a mark is the clock; on a GPU it is a CUDA event,
so that what is measured is the stream and not the launches. The backward pass of a part begins with the gradient of its
output and ends with that of its input: hooks on tensors tell, and neither change the graph nor a value.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from megatron_octo.train.flame import Times
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.parts import first_tensor, parts
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState

_LEAVES = {
    "embedding": "embedding",
    "input_norm": "norms",
    "attention": "attention",
    "mlp_norm": "norms",
    "mlp": "mlp",
    "final_norm": "norms",
    "output": "output and loss",
}
Label = tuple[str, ...]
_OTHER: Label = ("other",)


class Timeline:
    """Marks in time and the label that each begins."""

    def __init__(self, device: torch.device, label: Label) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Label]] = []
        self.switch(label)

    @property
    def label(self) -> Label:
        """What time is counted towards now."""
        return self._marks[-1][1]

    def switch(self, label: Label) -> None:
        """Count what comes towards another label."""
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((now, label))

    def times(self) -> Times:
        """End, and add the seconds of each label up; waits for the device."""
        self.switch(_OTHER)
        if self._cuda:
            torch.cuda.synchronize()
        found: Times = {}
        for (began, label), (ended, _) in zip(self._marks, self._marks[1:], strict=False):
            seconds = began.elapsed_time(ended) / 1e3 if self._cuda else ended - began
            found[label] = found.get(label, 0.0) + seconds
        return found


class StepProbe:
    """Times one training step from its making to `times`; `close` takes every hook away again.

    In a pipeline, all time inside the schedule and outside the model's passes counts as waiting for other stages.

    Args:
        engine: whose data and schedule are timed.
        state: whose model and optimizer are timed.
        hooks: whose work after the step is timed.
    """

    def __init__(self, engine: Engine, state: TrainState, hooks: list[Hook]) -> None:
        self._line = Timeline(engine.runtime.device, ("gradients", "clear"))
        self._between: Label = ("waiting for stages",) if engine.runtime.pipeline_size > 1 else _OTHER
        self._undo = ExitStack()
        self._wrap(engine.batches, "of_step", ("data",), self._between)
        for config in {id(model.config): model.config for model in state.models}.values():
            self._wrap(config, "finalize_model_grads_func", ("gradients", "reduce"), _OTHER)
        self._wrap(state.optimizer, "prepare_grads", ("gradients", "norm"), ("gradients", "norm"))
        self._wrap(state.optimizer, "get_grad_norm", ("gradients", "norm"), _OTHER)
        self._wrap(state.optimizer, "step_with_ready_grads", ("update",), _OTHER)
        for hook in hooks:
            self._wrap(hook, "after_step", ("hooks", type(hook).__name__), _OTHER)
        for model in state.models:
            self._watch_chunk(model)
        for name, part in parts(state.models):
            leaf = _LEAVES.get(name.rsplit(".", 1)[-1])
            if leaf is not None:
                self._watch_part(part, leaf)

    def update(self) -> None:
        """The gradients have been judged: the optimizer comes now."""
        self._line.switch(("update",))

    def times(self) -> Times:
        """Seconds by path since the probe was made."""
        return self._line.times()

    def close(self) -> None:
        """Take all hooks away; may be called twice."""
        self._undo.close()

    def _wrap(self, owner: Any, name: str, during: Label, after: Label) -> None:
        """Time a function that is an attribute of an object."""
        plain = getattr(owner, name)
        own = name in vars(owner)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._line.switch(during)
            try:
                return plain(*arguments, **options)
            finally:
                self._line.switch(after)

        setattr(owner, name, timed)
        self._undo.callback(lambda: setattr(owner, name, plain) if own else delattr(owner, name))

    def _hook(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def _watch_chunk(self, model: Any) -> None:
        """A chunk's forward pass, and its backward pass from the gradient of its output to the end of the graph."""
        first = ("backward", "output and loss" if model.post_process else "other")

        def began(module: torch.nn.Module, _inputs: Any) -> None:
            if module.training:
                self._line.switch(("forward", "other"))

        def back(_gradient: torch.Tensor) -> None:
            self._line.switch(first)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._line.switch(self._between))

        def ended(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if module.training:
                self._line.switch(self._between)
                _on_gradient(first_tensor(output), back)

        self._hook(model.register_forward_pre_hook(began))
        self._hook(model.register_forward_hook(ended))

    def _watch_part(self, part: torch.nn.Module, leaf: str) -> None:
        """A part's forward pass, which may run again inside a backward pass, and its backward pass."""
        line, backward, rest = self._line, ("backward", leaf), ("backward", "other")
        before: list[Label] = []

        def began(module: torch.nn.Module, inputs: Any) -> None:
            if not module.training:
                return
            again = line.label[0] in ("backward", "recompute")
            before.append(line.label)
            line.switch(("recompute" if again else "forward", leaf))
            if inputs and isinstance(inputs[0], torch.Tensor):
                _on_gradient(inputs[0], done)

        def done(_gradient: torch.Tensor) -> None:
            if line.label == backward:  # else the part below has begun with this very gradient
                line.switch(rest)

        def ended(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if not module.training:
                return
            after = before.pop()
            if leaf != "output and loss":  # the loss follows its layer without being a module
                line.switch(after)
            _on_gradient(first_tensor(output), lambda _gradient: line.switch(backward))

        self._hook(part.register_forward_pre_hook(began))
        self._hook(part.register_forward_hook(ended))


def _on_gradient(tensor: torch.Tensor, call: Callable[[torch.Tensor], None]) -> None:
    if tensor.requires_grad:
        tensor.register_hook(call)

"""Everything a resume needs, in one object.

The position is the whole state of the data order (windows are a function of the step) and of the learning
rate (a function of the tokens). Random numbers are drawn only for initial weights, each from the run's seed
and the parameter's name: dropout is zero, so no generator has to be carried across a restart.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_octo import __version__
from megatron_octo.config.run import RunConfig
from megatron_octo.train.facts import Trouble


@dataclass
class TrainState:
    """What changes while a run trains.

    Args:
        run: the resolved configuration.
        chunks: this rank's model chunks, wrapped for gradient reduction.
        optimizer: Megatron's optimizer over them; holds fp32 weights and Adam's moments.
        root_tokens: tokens of the lineage before this run began (0 unless it is a branch).
        lineage: the lineage record of a branch, else None.
        step: optimizer steps taken by this run.
        memory: what hooks remember across restarts, by hook; JSON's types, the same on every rank.
        data: what tells each source that was or is read from others: see `data.mix.identity`.
        tokenizer: what tells its tokenizer from others; None where it is not there.
        stop_wanted: this process was asked to stop at the next step boundary.
        trouble: why the gradients of the step at hand are not used; None as long as they are.
        aside: what the run does instead of a step, in words; empty while it takes one.
    """

    run: RunConfig
    chunks: list[Any]
    optimizer: Any
    root_tokens: int = 0
    lineage: dict[str, Any] | None = None
    step: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    stop_wanted: bool = False
    trouble: Trouble | None = None
    aside: str = ""

    @property
    def run_tokens(self) -> int:
        """Tokens this run has consumed."""
        return self.step * self.run.tokens_per_step

    @property
    def tokens(self) -> int:
        """Tokens the weights have seen, along the whole lineage."""
        return self.root_tokens + self.run_tokens

    @property
    def models(self) -> list[torch.nn.Module]:
        """The model chunks without their wrappers."""
        return [_unwrap(chunk) for chunk in self.chunks]

    def gather_weights(self) -> None:
        """Complete this rank's weights before anything but the model reads them; collective over all ranks.

        With `overlap_param_gather` a rank has, after a step, only its own share of the new weights: the others come
        with the next forward pass. A checkpoint of that moment would hold new and old weights side by side.
        """
        if self.run.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Let whoever watches over the run know that this is no step; where an error ends the run, it stays known."""
        before, self.aside = self.aside, f"{what} after step {self.step}"
        yield
        self.aside = before

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's `run.json` says about this moment."""
        return {
            "step": self.step,
            "run_tokens": self.run_tokens,
            "tokens": self.tokens,
            "moments": True,
            "layout": self.run.parallel.label,
            "versions": versions(),
            "lineage": self.lineage,
            "data": self.data,
            "tokenizer": self.tokenizer,
            "memory": copy.deepcopy(self.memory),  # hooks go on with it while this is being written
            "config": self.run.model_dump(mode="json"),
        }


def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    import megatron.core

    return {
        "megatron_octo": __version__,
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk

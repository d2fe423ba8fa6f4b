"""What a run reads: a mixture of indexed datasets, what follows it, and what takes the place of a missing source."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from megatron_octo.config.base import Seed, Strict
from megatron_octo.units import Tokens

TOLERANCE = 1e-6
"""How far from 1 the weights of a mixture may sum."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Check that the weights of a mixture sum to 1.

    Raises:
        ValueError: they do not; the message has their sum, and weights in the same proportions that do.
    """
    total = math.fsum(weights.values())
    if abs(total - 1) > TOLERANCE:
        scaled = ", ".join(f"{name}: {weight / total:.9g}" for name, weight in weights.items())
        raise ValueError(f"weights are shares and sum to 1, these to {total:.9g}; scaled to 1 they are {scaled}")


class Source(Strict):
    """One indexed dataset of a mixture; weights are shares of packed sequences and sum to 1."""

    path: Path = Field(description="prefix of the .bin/.idx pair")
    weight: float = Field(gt=0, allow_inf_nan=False)
    corpora: list[str] | None = Field(
        default=None,
        min_length=1,
        description="what it is made of, as `octo data corpora` lists it: for a forecast where the pair is not there",
    )


class _Mixed(Strict):
    mixture: dict[str, Source] = Field(min_length=1)

    @field_validator("mixture")
    @classmethod
    def _weights_sum_to_one(cls, mixture: dict[str, Source]) -> dict[str, Source]:
        check_weights({name: source.weight for name, source in mixture.items()})
        return mixture


class Phase(_Mixed):
    """A later mixture of a run. Sources it shares with earlier ones are read on, others from their start."""

    at: Tokens = Field(gt=0, description="token position of the run where it takes over, rounded up to a window")


class DataConfig(_Mixed):
    """What is read: a weighted mixture of indexed datasets cut into windows of one length."""

    tokenizer: Path = Field(description="tokenizer directory in Hugging Face form")
    sequence_length: int = Field(gt=1)
    seed: Seed = 0
    phases: list[Phase] | None = Field(default=None, description="mixtures that follow, by token position")
    replace: dict[str, str] | None = Field(
        default=None, description="missing source -> the one that takes its weight; any other missing one is an error"
    )
    replaced: dict[str, str] | None = Field(
        default=None, description="what `replace` has done when the run began; its sources are out of the mixtures"
    )

    @property
    def mixtures(self) -> list[tuple[int, dict[str, Source]]]:
        """Every mixture with the window of the run it begins at, in order."""
        later = [(-(-phase.at // self.sequence_length), phase.mixture) for phase in self.phases or []]
        return [(0, self.mixture), *later]

    @property
    def paths(self) -> dict[str, Path]:
        """Every source of every mixture, by name in order."""
        found: dict[str, Path] = {}
        for _, mixture in self.mixtures:
            found = {name: source.path for name, source in mixture.items()} | found
        return dict(sorted(found.items()))

    @model_validator(mode="after")
    def _phases_in_order(self) -> DataConfig:
        starts = [window for window, _ in self.mixtures]
        if any(after <= before for before, after in pairwise(starts)):
            raise ValueError("phases need increasing token positions (at), each at least a window after the one before")
        return self

    @model_validator(mode="after")
    def _one_name_one_dataset(self) -> DataConfig:
        names: dict[str, str] = {}
        for _, mixture in self.mixtures:
            for name, source in mixture.items():
                if source.path != self.paths[name]:
                    raise ValueError(f"source {name} is {self.paths[name]} in one mixture and {source.path} in another")
        for name, path in self.paths.items():
            other = names.setdefault(os.path.normpath(path), name)
            if other != name:
                raise ValueError(f"{other} and {name} are the same dataset ({path}): its windows would be read twice")
        return self

    @model_validator(mode="after")
    def _replacements_are_there(self) -> DataConfig:
        for missing, other in (self.replace or {}).items():
            if missing not in self.paths:
                raise ValueError(f"replace names {missing!r}, which no mixture holds")
            for _, mixture in self.mixtures:
                if missing in mixture and other not in mixture:
                    raise ValueError(f"replace: {missing} -> {other}: a mixture with {missing} does not hold {other}")
            seen, place = {missing}, other
            while place in (self.replace or {}):
                if place in seen:
                    raise ValueError(f"replace: {missing} -> {other} goes round in a circle")
                seen.add(place)
                place = (self.replace or {})[place]
        back = [name for name in self.replaced or {} if name in self.paths]
        if back:
            raise ValueError(f"replaced names {back[0]!r}, which a mixture holds: remove one of the two")
        return self

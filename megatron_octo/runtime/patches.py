"""Replacing attributes of other packages: each with its reason, each once."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One replaced attribute.

    Args:
        target: module or class that holds it, as `package.module` or `package.module:Class`.
        name: the attribute.
        replace: from the original attribute to its replacement.
        reason: what goes wrong without it, and which megatron-core call needs it.
    """

    target: str
    name: str
    replace: Callable[[Any], Any]
    reason: str


_applied: set[Patch] = set()


def apply(patches: Iterable[Patch]) -> None:
    """Replace what is not replaced yet in this process."""
    for patch in patches:
        if patch not in _applied:
            holder = pkgutil.resolve_name(patch.target)
            setattr(holder, patch.name, patch.replace(getattr(holder, patch.name)))
            _applied.add(patch)

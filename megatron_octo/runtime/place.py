"""Where in the program a thread is, said for people: which collective, called by which line."""

from __future__ import annotations

import linecache
from pathlib import PurePath
from types import FrameType
from typing import NamedTuple

_WAITS = (".wait(", ".synchronize(", ".item(", ".tolist(", ".cpu(")
"""What a line says that waits for messages without a function of torch.distributed in between."""

_COLLECTIVES = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")
_WRAPPERS = {"wrapper"}
_PLUMBING = ("torch.", "contextlib", "functools")


class Place(NamedTuple):
    """A place in the program.

    Args:
        text: in words, e.g. "all_reduce, called by megatron_octo/train/step.py:96 (_agree)".
        collective: the function that waits for other ranks; empty if the thread does not.
    """

    text: str
    collective: str


def place_of(frame: FrameType) -> Place:
    """The place of a thread whose innermost frame is given.

    The collective is the innermost function of torch.distributed, or a line that waits for a message under way. Its
    caller is the innermost frame outside torch, and where that is a library's, our own line is said too.
    """
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    distributed = [one for one in frames if _module(one).startswith(_COLLECTIVES)]
    outside = [one for one in frames if not _module(one).startswith(_PLUMBING)]
    caller = next(iter(outside), None)
    collective = next((one.f_code.co_name for one in distributed if one.f_code.co_name not in _WRAPPERS), "")
    line = linecache.getline(caller.f_code.co_filename, caller.f_lineno).strip() if caller is not None else ""
    if not collective:
        collective = line if any(word in line for word in _WAITS) else ""
    text = f"{collective}, called by {_say(caller)}" if collective else _say(caller)
    ours = next((one for one in outside if _module(one).startswith("megatron_octo")), None)
    if ours is not None and ours is not caller:
        text += f", in {_say(ours)}"
    return Place(text, collective)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _say(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown place"
    path = PurePath(frame.f_code.co_filename)
    packages = _module(frame).count(".") + 1
    return f"{'/'.join(path.parts[-packages:])}:{frame.f_lineno} ({frame.f_code.co_name})"

"""A campaign directory -> `report/report.json`, `report/index.html`, and the overview picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_octo.campaign.facts import build_facts
from megatron_octo.campaign.record import read_record
from megatron_octo.campaign.state import write_atomically
from megatron_octo.errors import DataError


def write_report(out: Path) -> dict[str, Any]:
    """Write a campaign's report from what its stages left; a part that is not there yet is named as missing.

    Args:
        out: campaign directory.

    Returns:
        The content of `report/report.json`.

    Raises:
        DataError: `out` is not a directory.
    """
    from megatron_octo.campaign.page import render_page

    record = read_record(_directory(out))
    facts = build_facts(record)
    page = render_page(record, facts)
    write_atomically(out / "report" / "report.json", json.dumps(facts, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report" / "index.html", page)
    return facts


def picture(out: Path, path: Path) -> Path:
    """Draw the overview, 1600 x 700 pixels: loss curves, and accuracy before and after RL.

    Args:
        out: campaign directory.
        path: PNG file to write.

    Returns:
        `path`.

    Raises:
        DataError: `out` is not a directory.
    """
    from megatron_octo.campaign.figures import overview_figure, to_png

    record = read_record(_directory(out))
    data = to_png(overview_figure(record, build_facts(record)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
    return path


def _directory(out: Path) -> Path:
    if not out.is_dir():
        raise DataError(f"{out}: no such campaign directory", fix="name the --out of a campaign")
    return out

"""A campaign directory -> `report/report.json`, `report/index.html`, and the overview picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_octo.campaign.facts import build_facts
from megatron_octo.campaign.record import read_record
from megatron_octo.errors import DataError
from megatron_octo.files import write_bytes, write_text


def write_report(out: Path) -> dict[str, Any]:
    """Write a campaign's report from what its stages left; a part that is not there yet is named as missing.

    Args:
        out: campaign directory.

    Returns:
        The content of `report/report.json`.

    Raises:
        DataError: `out` is not a campaign directory.
    """
    from megatron_octo.campaign.page import render_page

    record = read_record(_directory(out))
    facts = build_facts(record)
    page = render_page(record, facts)
    write_text(out / "report" / "report.json", json.dumps(facts, indent=2, allow_nan=False) + "\n")
    write_text(out / "report" / "index.html", page)
    return facts


def picture(out: Path, path: Path) -> Path:
    """Draw the overview, 1600 x 700 pixels: loss curves, and accuracy before and after RL.

    Args:
        out: campaign directory.
        path: PNG file to write.

    Returns:
        `path`.

    Raises:
        DataError: `out` is not a campaign directory.
    """
    from megatron_octo.campaign.figures import overview_figure
    from megatron_octo.page.drawing import to_png

    record = read_record(_directory(out))
    write_bytes(path, to_png(overview_figure(record, build_facts(record))))
    return path


def _directory(out: Path) -> Path:
    if not (out / "campaign.yaml").exists():  # its content may be damaged: the report says so
        raise DataError(f"{out}: not a campaign directory", "it has no campaign.yaml", "name the --out of a campaign")
    return out

"""A finished data directory -> one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_octo.data.report.facts import build_facts
from megatron_octo.files import write_text, writing

PAGE = "report.html"


def write_report(
    directory: Path, out: Path | None = None, mixture: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write the page of a data directory, completely or not at all.

    Args:
        directory: finished by `octo data build`.
        out: file to write; by default `report.html` in the directory.
        mixture: what a run reads of each source, as `octo data forecast --json` prints it; None: the page says that
            no mixture is stated.

    Returns:
        The file, and the facts that the page shows.

    Raises:
        DataError: the directory holds no finished build, or a file of it is missing or damaged.
        EnvironmentProblem: the page cannot be written there.
    """
    from megatron_octo.data.report.page import render_page

    facts = {**build_facts(directory), "mixture": mixture}
    path = out or directory / PAGE
    page = render_page(facts)
    with writing(path):
        write_text(path, page)
    return path, facts

"""What `octo data build` says when it has ended: what became of each corpus, of all of them, and what comes next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import typer

_MUCH = 0.5  # share of a corpus's records that nobody loses without being told


def tell_build(out: Path, manifest: dict[str, Any], done: str) -> None:
    """Print the account of a finished data directory; on stderr, a corpus that lost most of its records.

    Args:
        out: the directory.
        manifest: its manifest.
        done: what the build found or mended there; empty where it made all of it.
    """
    from megatron_octo.data.clean.measure import absent_line

    directory = shlex.quote(str(out))
    for name, facts in manifest["sources"].items():
        typer.echo(_source(name, facts, out / name))
        _warn(name, facts.get("accounts"), directory)
    rows, settings = manifest["tokenizer"]["rows"], manifest["settings"]
    typer.echo(
        f"total: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens; {_cleaned(settings)}; "
        f"vocabulary {rows:,} ({out / 'tokenizer'})"
    )
    for line in absent_line(manifest.get("cleaning") or {}):
        typer.echo(line)
    if done:
        typer.echo(f"done: {done}")
    first = shlex.quote(str(out / next(iter(manifest["sources"]))))
    typer.echo(f"next: octo data inspect {first}; octo data report {directory}; octo data verify {directory}")


def _source(name: str, facts: dict[str, Any], prefix: Path) -> str:
    accounts = facts.get("accounts", {})
    skipped, first = _counted("skipped", accounts), accounts.get("first", [])[:1]
    beyond = facts.get("beyond_budget", {}).get("documents", 0)
    left = [
        f"{skipped}, first {first[0]}" if first else skipped,
        _counted("removed", accounts),
        *([f"{beyond:,} beyond its budget"] if beyond else []),
    ]
    return f"{name}: {facts['documents']:,} documents, {facts['tokens']:,} tokens; {'; '.join(left)}; {prefix}"


def _counted(what: str, accounts: dict[str, Any]) -> str:
    reasons = accounts.get(what, {})
    named = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in reasons.items())
    return f"{sum(reasons.values()):,} {what}" + (f" ({named})" if reasons else "")


def _warn(name: str, accounts: dict[str, Any] | None, directory: str) -> None:
    lost = sum(sum(accounts[what].values()) for what in ("skipped", "removed")) if accounts else 0
    if accounts and lost > _MUCH * accounts["read"]:
        print(
            f"octo: warning: {name}: {lost:,} of {accounts['read']:,} records are left out "
            f"({_counted('skipped', accounts)}; {_counted('removed', accounts)}); see octo data report {directory}",
            file=sys.stderr,
        )


def _cleaned(settings: dict[str, Any]) -> str:
    same, leaks = settings["deduplicate"], settings["decontaminate"]
    how = [word for word, on in (("exact", same and same["exact"]), ("near", same and same["near"])) if on]
    once = f"deduplicated ({' and '.join(how)})" if how else "not deduplicated"
    return f"{once}, " + (f"decontaminated against {', '.join(leaks['against'])}" if leaks else "not decontaminated")

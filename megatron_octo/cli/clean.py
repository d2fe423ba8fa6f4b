"""`octo data dedup` and `octo data decontaminate`: files without duplicates and leaks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_octo.cli.shared import AsJson, print_json
from megatron_octo.errors import ConfigError

if TYPE_CHECKING:
    from megatron_octo.config.clean import Decontaminate

_ALL = 10**9

Against = Annotated[
    list[str] | None, typer.Option("--against", help="NAME=PATH: a benchmark and its file; may be given again")
]
Mix = Annotated[Path | None, typer.Option(help="file of a build: take what it says of cleaning from there")]
Paths = Annotated[list[str], typer.Argument(help="[NAME=]PATH: file, folder, glob or URL; jsonl(.gz|.zst) or parquet")]
Adapter = Annotated[str, typer.Option(help="how a record becomes a text, see `octo data corpora`")]
Fields = Annotated[
    list[str] | None, typer.Option("--field", help="FIELD=NAME: what a field of the adapter is called in these files")
]
SkipBad = Annotated[bool, typer.Option(help="count and leave out damaged records, instead of stopping at the first")]
Workers = Annotated[int | None, typer.Option(help="shards at the same time, each on one core")]


def dedup(
    paths: Paths,
    out: Annotated[Path, typer.Option(help="directory to write")],
    near: Annotated[bool, typer.Option(help="also near duplicates, by MinHash")] = True,
    against: Against = None,
    adapter: Adapter = "text",
    field: Fields = None,
    skip_bad: SkipBad = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Write the records of files that are no duplicates: the first in the order given is kept.

    OUT gets <name>/<shard>.jsonl.zst with the records as they are, removals.jsonl with what is left out and why, and
    manifest.json with the accounts. Killed at any moment, it goes on when given again.

    Example: octo data dedup pages/ extra.parquet --field text=content --out clean
    """
    values = _corpora(paths, adapter, field, skip_bad)
    values["deduplicate"] = {"near": {} if near else None}
    if against:
        values["decontaminate"] = {"against": _benchmarks(against)}
    _clean(values, out, workers, as_json)


def decontaminate(
    paths: Annotated[list[str] | None, typer.Argument(help="[NAME=]PATH, as for `octo data dedup`")] = None,
    against: Against = None,
    mix: Mix = None,
    out: Annotated[Path | None, typer.Option(help="directory to write; with --measure alone gets recall.json")] = None,
    measure: Annotated[bool, typer.Option(help="plant leaks and near-misses, and show which are found")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="questions of each benchmark to plant; all by default")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of what is planted")] = 0,
    adapter: Adapter = "text",
    field: Fields = None,
    skip_bad: SkipBad = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Write the records of files that give no question of a benchmark away, or measure how well such are found.

    A record gives a question away if it holds a third of its 13-grams, or in a row 45% of its words or 30 of them, or
    90% of its 13-grams with other numbers, or all of a question that is shorter. 13-grams that three questions share
    count for nothing. A build file (--mix) may set other limits.

    Example: octo data decontaminate pages/ --against gsm8k=eval/gsm8k/test.jsonl --out clean

    Example: octo data decontaminate --against math500=eval/math500/test.jsonl --measure --json
    """
    settings = _settings(against, mix)
    if not measure and not paths:
        raise ConfigError("nothing to do", "no files are named", "name files and --out, or add --measure")
    if not paths:
        _measure(settings, seed, sample, out, as_json)
        return
    if out is None:
        raise ConfigError("--out is missing", "the records that stay are written there", "add --out DIRECTORY")
    values = _corpora(paths, adapter, field, skip_bad) | {"seed": seed}
    planted = (sample or _ALL) if measure else settings.measure
    values["decontaminate"] = settings.model_dump(mode="json") | {"measure": planted}
    _clean(values, out, workers, as_json, show_recall=measure)


def _settings(against: list[str] | None, mix: Path | None) -> Decontaminate:
    from megatron_octo.config.clean import Decontaminate
    from megatron_octo.config.data import DataBuildConfig
    from megatron_octo.config.load import load_config, parse_config

    if (mix is None) == (not against):
        raise ConfigError("give --against or --mix, one of them", fix="--against NAME=PATH, or --mix BUILD.yaml")
    if mix is None:
        return parse_config(Decontaminate, {"against": _benchmarks(against or [])}, "--against")
    found = load_config(DataBuildConfig, mix).decontaminate
    if found is None:
        raise ConfigError(f"{mix} says nothing of decontaminate", fix="add it there, or use --against")
    return found


def _benchmarks(against: list[str]) -> dict[str, dict[str, str]]:
    return {name: {"path": path} for name, path in (_pair(text, "--against") for text in against)}


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"{option} {text!r}", "it has the form NAME=VALUE", f"write {option} NAME=VALUE")
    return name, value


def _corpora(paths: list[str], adapter: str, fields: list[str] | None, skip_bad: bool) -> dict[str, Any]:
    """The configuration of a build that ends before the tokens: it has a tokenizer that nobody asks for."""
    renamed = dict(_pair(text, "--field") for text in fields or [])
    given = [re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9_-]*)=(.+)", text) for text in paths]
    names = [match[1] for match in given if match]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name}= names two of the paths", "the results lie side by side", "name them apart")
    corpora: dict[str, dict[str, Any]] = {}
    for text, match in zip(paths, given, strict=True):
        name, path = (match[1], match[2]) if match else (_made_up(text, {*names, *corpora}), text)
        corpora[name] = {"path": path, "adapter": adapter, "fields": renamed}
    return {
        "tokenizer": {"train": {"vocabulary_size": 300}},
        "corpora": corpora,
        "on_bad_line": "skip" if skip_bad else "strict",
    }


def _made_up(path: str, taken: set[str]) -> str:
    """A name for what is at a path: of its last part what a name may have, with a number where that is taken."""
    stem = re.sub(r"[^A-Za-z0-9]+", "_", Path(path.rstrip("/*")).name.partition(".")[0]).strip("_") or "files"
    numbered = (f"{stem}-{count}" for count in itertools.count(2))
    return next(name for name in itertools.chain([stem], numbered) if name not in taken)


def _clean(values: dict[str, Any], out: Path, workers: int | None, as_json: bool, show_recall: bool = False) -> None:
    from megatron_octo.config.data import DataBuildConfig
    from megatron_octo.config.load import parse_config
    from megatron_octo.data.clean.files import clean_files
    from megatron_octo.data.clean.measure import absent_line, table_lines

    manifest = clean_files(parse_config(DataBuildConfig, values, "command line"), out, workers)
    if as_json:
        print_json(manifest)
        return
    for name, account in manifest["accounts"].items():
        left = ", ".join(f"{count} {reason}" for reason, count in {**account["skipped"], **account["removed"]}.items())
        typer.echo(f"{name}: {account['documents']} of {account['read']} records kept; left out: {left or 'none'}")
    recall = manifest["cleaning"]["recall"]
    for line in table_lines(recall) if recall and show_recall else absent_line(manifest["cleaning"]):
        typer.echo(line)


def _measure(settings: Decontaminate, seed: int, sample: int | None, out: Path | None, as_json: bool) -> None:
    from megatron_octo.data.clean.measure import measure, table_lines
    from megatron_octo.files import write_json, writing

    facts = measure(settings, seed, sample)
    if out is not None:
        with writing(out):
            write_json(out / "recall.json", facts)
    print_json(facts) if as_json else typer.echo("\n".join(table_lines(facts)))

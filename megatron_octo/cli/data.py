"""`octo data`: corpora to indexed datasets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_octo.cli import clean, mix
from megatron_octo.cli.built import tell_build
from megatron_octo.cli.shared import AsJson, print_facts, print_json
from megatron_octo.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Corpora to indexed datasets.")
app.command("dedup")(clean.dedup)
app.command("decontaminate")(clean.decontaminate)
app.command("forecast")(mix.forecast)
app.command("who")(mix.who)


@app.command()
def corpora(
    name: Annotated[str | None, typer.Argument(help="one of them; all by default")] = None, as_json: AsJson = False
) -> None:
    """List the corpora that a build can read: where each is published, its fields, licence and size.

    Example: octo data corpora openr1-math-220k
    """
    from megatron_octo.data.corpora.registry import ADAPTERS, describe, find_adapter

    if name is not None:
        facts = describe(find_adapter(name, "NAME"))
        print_facts(facts if as_json else {key: value for key, value in facts.items() if value}, as_json)
    elif as_json:
        print_json({known: describe(adapter) for known, adapter in ADAPTERS.items()})
    else:
        typer.echo(_CORPORA.format("name", "tokens", "form", "access", "published as"))
        for adapter in ADAPTERS.values():
            typer.echo(_line(describe(adapter)))
        typer.echo(_LEGEND)


_CORPORA = "{:26} {:>8}  {:10} {:8} {}"
_LEGEND = """
tokens: - not known; ? remembered, not read from what is published
form: - whatever files hold it, jsonl(.gz, .zst) or parquet
access: gated: its owner is asked on its page of the hub; refused: holds no text, octo data corpora NAME says why"""


def _line(facts: dict[str, Any]) -> str:
    access = "refused" if facts["refused"] else "gated" if facts["gated"] else ""
    columns = (facts["name"], facts["tokens"] or "-", facts["form"] or "-", access, facts["hub"] or facts["title"])
    return _CORPORA.format(*columns).rstrip()


@app.command("build")
def build(
    file: Path,
    out: Annotated[Path, typer.Option(help="directory to write")],
    workers: Annotated[int | None, typer.Option(help="shards at the same time, each on one core")] = None,
    executor: Annotated[str, typer.Option(help="local, ray (RAY_ADDRESS, or one of this machine) or slurm")] = "local",
    as_json: AsJson = False,
) -> None:
    """Generate or read corpora, tokenise, and write indexed datasets with a manifest.

    Killed at any moment, it goes on when given again; the result does not depend on workers and executor.
    recipes/builds/minimal.yaml, which comes with the package, shows the keys of the file, each explained.

    Example: octo data build mix.yaml --out data --workers 8
    """
    from megatron_octo.config.data import DataBuildConfig
    from megatron_octo.config.load import load_config
    from megatron_octo.config.recipes import find_recipe

    file = find_recipe(file, "builds")
    config = load_config(DataBuildConfig, file)
    if executor == "slurm":
        from megatron_octo.data.engine.jobs import render_build

        script, said = render_build(config, out, workers)
        if as_json:
            print_json({"script": script, "submitted": said})
        elif script is None:
            typer.echo(f"{out}: finished and whole; no job is needed")
        else:
            typer.echo(said.rstrip() if said else f"submit the jobs with: bash {shlex.quote(str(script))}")
        return
    from megatron_octo.data.engine.build import build_data

    done: list[str] = []
    manifest = build_data(config, out, workers, executor, done.append)
    print_json({"done": done, **manifest}) if as_json else tell_build(out, manifest, "; ".join(done))


@app.command("work", hidden=True)
def work(
    file: Path,
    out: Annotated[Path, typer.Option(help="data directory")],
    stage: Annotated[str, typer.Option(help="name of the stage")],
    share: Annotated[str, typer.Option(help="I/N: the tasks with number I modulo N")],
) -> None:
    """Do a share of one stage of a build: what a job of `octo data build --executor slurm` runs.

    Example: octo data work mix.yaml --out data --stage tokenise --share 3/100
    """
    from megatron_octo.config.data import DataBuildConfig
    from megatron_octo.config.load import load_config
    from megatron_octo.data.engine.jobs import work_on_share

    work_on_share(load_config(DataBuildConfig, file), out, stage, share)


@app.command("inspect")
def inspect(prefix: Path, as_json: AsJson = False) -> None:
    """Check an indexed dataset and show what it holds; of a finished build's directory, list its datasets.

    Example: octo data inspect data/web
    """
    from megatron_octo.data.index.inspect import inspect as look
    from megatron_octo.data.index.inspect import list_pairs

    print_facts(list_pairs(prefix) or look(prefix), as_json)


@app.command("verify")
def verify(directory: Path, as_json: AsJson = False) -> None:
    """Check every file of a data directory against its manifest.

    Example: octo data verify data
    """
    from megatron_octo.data.engine.manifest import verify_data

    manifest = verify_data(directory)
    if as_json:
        sources = {name: _counts(facts) for name, facts in manifest["sources"].items()}
        print_json({"directory": directory, "whole": True, **_counts(manifest), "sources": sources})
    else:
        typer.echo(f"{directory}: every file is as its manifest says")


def _counts(facts: dict[str, Any]) -> dict[str, int]:
    return {what: facts[what] for what in ("documents", "tokens")}


@app.command("report")
def report(
    directory: Path,
    out: Annotated[Path | None, typer.Option(help="file to write; report.html in the directory by default")] = None,
    mixture: Annotated[
        Path | None, typer.Option(help="run file or mixture: show what it reads of each source, as octo data forecast")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="of that run, e.g. 20B; by default the run file's")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page of a data directory: sizes, lengths, what was left out and why, recall, samples, inputs.

    The page needs no network. --json prints the facts it shows.

    Example: octo data report data --out report.html

    Example: octo data report data --mixture recipes/mixtures/long.yaml --tokens 20B
    """
    from megatron_octo.data.report.report import write_report

    if tokens is not None and mixture is None:
        raise ConfigError("--tokens without --mixture", "they are those of a run", "name its file: --mixture FILE")
    path, facts = write_report(directory, out, None if mixture is None else mix.foresee(mixture, tokens))
    print_json(facts) if as_json else typer.echo(f"report: {path}")


@app.command("curate")
def curate_command(
    file: Path,
    out: Annotated[Path, typer.Option(help="directory to write")],
    step: Annotated[
        str | None, typer.Option(help="stop after sample, judge, train, classify or refine; all steps by default")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="shards read at the same time, each on one core")] = None,
    as_json: AsJson = False,
) -> None:
    """Sample corpora, let a model judge the sample, train a classifier on it, keep what it likes, and refine that.

    Answers are kept in OUT/answers as they come: killed at any moment, it goes on when given again and asks no
    question twice. The key of an endpoint is read from the environment variable that the file names.

    Example: octo data curate recipes/curation/megamath_web_pro_max.yaml --out curated --step judge
    """
    from megatron_octo.config.curate import CurateConfig
    from megatron_octo.config.load import load_config
    from megatron_octo.config.recipes import find_recipe
    from megatron_octo.data.curate.run import curate

    found = curate(load_config(CurateConfig, find_recipe(file, "curation")), out, step, workers)
    steps = found.get("steps", found)
    print_json(steps) if as_json else typer.echo("\n".join(_step(name, facts) for name, facts in steps.items()))


def _step(name: str, facts: dict[str, Any]) -> str:
    hidden = ("curve", "asked", "model", "sha256", "histogram", "accounts", "first")
    shown = {**facts.get("accounts", {}), **{key: value for key, value in facts.items() if value not in ({}, [])}}
    return f"{name}: " + ", ".join(_fact(key, value) for key, value in shown.items() if key not in hidden and value)


def _fact(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, dict):
        return f"{words} ({', '.join(f'{key} {number}' for key, number in value.items())})"
    return f"{words} {value}"

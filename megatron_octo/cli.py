"""`octo`: parse, call one function, print. No logic."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from megatron_octo import __version__
from megatron_octo.errors import OctoError, machine_problem

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
    help="OctoThinker on Megatron-Core: mid-training, branches, conversion, PPO, evaluation.",
)  # fmt: skip
_groups = {
    "data": "Corpora to indexed datasets.",
    "branch": "Runs and their forks.",
    "convert": "Hugging Face <-> Megatron checkpoints, with a certificate.",
    "rl": "The OpenRLHF stage.",
    "eval": "Problems, answers, scores.",
    "campaign": "The whole tree of stages.",
}
_apps = {name: typer.Typer(no_args_is_help=True, help=text) for name, text in _groups.items()}
for _name, _app in _apps.items():
    app.add_typer(_app, name=_name)

_INTERRUPTED = 128 + signal.SIGINT

Out = Annotated[Path | None, typer.Option(help="directory to write")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value overrides")]
Directory = Annotated[str, typer.Argument(help="a directory, or a URL such as s3://bucket/model")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Out = None, seed: Annotated[int, typer.Option(min=0, help="seed of world, weights and order")] = 0
) -> None:
    """Run the whole campaign, tiny, on this machine; ends with OUT/report/index.html.

    Example: octo demo --out runs/demo
    """
    from megatron_octo.campaign.api import run_campaign

    name = "demo" if seed == 0 else f"demo-seed{seed}"
    _finish(run_campaign(Path("recipes/campaigns/demo.yaml"), out or Path("runs") / name, [f"seed={seed}"]))


@_apps["campaign"].command("run")
def campaign_run(file: Path, overrides: Overrides = None, out: Out = None) -> None:
    """Run a campaign, or go on with one that was interrupted.

    Example: octo campaign run recipes/campaigns/demo.yaml --out runs/demo
    """
    from megatron_octo.campaign.api import run_campaign

    _finish(run_campaign(file, out, overrides))


@_apps["campaign"].command("status")
def campaign_status(directory: Path, as_json: AsJson = False) -> None:
    """Show where each stage of a campaign stands.

    Example: octo campaign status runs/demo
    """
    from megatron_octo.campaign.api import campaign_stages

    rows = campaign_stages(directory)
    if as_json:
        _print_json([vars(state) for _, state in rows])
        return
    for stage, state in rows:
        typer.echo(f"{stage.name:16} {state.status:8} {state.seconds:8.1f} s  {stage.title}")


@_apps["campaign"].command("report")
def campaign_report(directory: Path, as_json: AsJson = False) -> None:
    """Write DIR/report/index.html and report.json from what the stages left.

    Example: octo campaign report runs/demo
    """
    from megatron_octo.campaign.report import write_report

    facts = write_report(directory)
    _print_json(facts) if as_json else typer.echo(str(directory / "report" / "index.html"))


@app.command()
def train(
    file: Path,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="stop, with a checkpoint, at this token position: 40K")] = None,
) -> None:
    """Train a run on this machine, or go on with it; starts as many processes as its layout needs.

    Example: octo train run.yaml parallel.tensor=2 --until 1M
    """
    from megatron_octo.train.api import train_run

    train_run(file, overrides or [], None if until is None else _tokens(until))


@_apps["branch"].command("show")
def branch_show(directory: Path, as_json: AsJson = False) -> None:
    """Show a run's ancestors: who forked from whom, at which token, carrying what.

    Example: octo branch show runs/demo/long
    """
    from megatron_octo.schedule.fork import describe_lineage, read_lineage

    lineage = read_lineage(directory)
    _print_json(lineage) if as_json else typer.echo(describe_lineage(lineage))


@_apps["data"].command("build")
def data_build(
    file: Path,
    out: Annotated[Path, typer.Option(help="directory to write")],
    workers: Annotated[int, typer.Option(min=1, help="processes that tokenise")] = 1,
) -> None:
    """Generate or read corpora, tokenise, and write indexed datasets with a manifest.

    Example: octo data build mix.yaml --out data
    """
    from megatron_octo.config.data import DataBuildConfig
    from megatron_octo.config.load import load_config
    from megatron_octo.data.build import build_data

    build_data(load_config(DataBuildConfig, file), out, workers)


@_apps["data"].command("inspect")
def data_inspect(prefix: Path, as_json: AsJson = False) -> None:
    """Check an indexed dataset and show what it holds.

    Example: octo data inspect data/web
    """
    from megatron_octo.data.indexed import inspect

    _print(inspect(prefix), as_json)


@_apps["data"].command("verify")
def data_verify(directory: Path) -> None:
    """Check every file of a data directory against its manifest.

    Example: octo data verify data
    """
    from megatron_octo.data.build import verify_data

    verify_data(directory)
    typer.echo(f"{directory}: every file is as its manifest says")


@_apps["convert"].command("to-hf")
def convert_to_hf(
    paths: Annotated[
        list[str], typer.Argument(help="CHECKPOINT OUT [CHECKPOINT OUT ...]; a run directory means its latest")
    ],
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer directory; by default the run's own")] = None,
    dtype: Annotated[str, typer.Option(help="source, fp32, bf16 or fp16")] = "source",
) -> None:
    """Convert checkpoints to Hugging Face directories, each with a certificate.

    Reads checkpoints of this project, Megatron-LM, Megatron-Bridge and NeMo 2; paths or URLs (s3://...).

    Example: octo convert to-hf runs/demo/long hf/long
    """
    from megatron_octo.convert.api import to_hf_many
    from megatron_octo.locations import locate

    if len(paths) % 2:
        raise typer.BadParameter("give pairs: CHECKPOINT OUT")
    places = [locate(path) for path in paths]
    to_hf_many(zip(places[::2], places[1::2], strict=True), locate(tokenizer) if tokenizer else None, dtype)


@_apps["convert"].command("from-hf")
def convert_from_hf(
    model: Directory,
    out: Annotated[str, typer.Argument(help="checkpoint directory to create")],
    layout: Annotated[str, typer.Option(help="octo, megatron-lm, megatron-bridge or nemo")] = "octo",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read pytorch_model.bin; values only, nothing in it is run")
    ] = False,
) -> None:
    """Convert a Hugging Face Llama, Qwen2.5 or Qwen3 to a checkpoint, by default one that `start.checkpoint` accepts.

    Example: octo convert from-hf Llama-3.2-1B start/
    """
    from megatron_octo.convert.api import from_hf
    from megatron_octo.locations import locate

    from_hf(locate(model), locate(out), layout, allow_pickle)


@_apps["convert"].command("relayout")
def convert_relayout(
    checkpoint: Directory,
    out: Annotated[str, typer.Argument(help="checkpoint directory to create")],
    layout: Annotated[str, typer.Option(help="octo, megatron-lm, megatron-bridge or nemo")],
) -> None:
    """Write a checkpoint's weights in another trainer's layout, either way.

    Example: octo convert relayout runs/long long-mlm --layout megatron-lm
    """
    from megatron_octo.convert.api import relayout
    from megatron_octo.locations import locate

    relayout(locate(checkpoint), locate(out), layout)


@_apps["convert"].command("verify")
def convert_verify(
    directory: Directory,
    strict: Annotated[
        bool, typer.Option("--strict", help="also refuse unlisted files, other library versions, checks not repeated")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a converted model against its certificate, from scratch; exit code 5 if it does not hold.

    Example: octo convert verify runs/demo/hf/long --strict
    """
    from megatron_octo.convert.api import format_verdict, verify
    from megatron_octo.locations import locate

    report = verify(locate(directory), strict)
    _print_json(report) if as_json else typer.echo(format_verdict(report))


@_apps["convert"].command("show")
def convert_show(path: Directory, as_json: AsJson = False) -> None:
    """List the tensors of a checkpoint or a Hugging Face directory, without loading them.

    Example: octo convert show runs/demo/stable
    """
    from megatron_octo.convert.api import format_tree, show
    from megatron_octo.locations import locate

    report = show(locate(path))
    _print_json(report) if as_json else typer.echo(format_tree(report))


@_apps["convert"].command("diff")
def convert_diff(a: Directory, b: Directory, as_json: AsJson = False) -> None:
    """Compare the tensors of two models of either format; exit code 1 if any differs.

    Example: octo convert diff runs/demo/stable runs/demo/long
    """
    from megatron_octo.convert.api import diff, format_diff
    from megatron_octo.locations import locate

    report = diff(locate(a), locate(b))
    _print_json(report) if as_json else typer.echo(format_diff(report))
    if not report["same"]:
        raise typer.Exit(1)


@_apps["convert"].command("average")
def convert_average(
    paths: Annotated[list[str], typer.Argument(help="checkpoints or runs; with --last, one run")],
    out: Annotated[str, typer.Option(help="checkpoint directory to create")],
    last: Annotated[int | None, typer.Option(help="average the newest K checkpoints of one run")] = None,
) -> None:
    """Average the weights of checkpoints into a new one.

    Example: octo convert average runs/long --last 3 --out runs/long-average
    """
    from megatron_octo.convert.api import average
    from megatron_octo.locations import locate

    average([locate(path) for path in paths], locate(out), last)


@_apps["convert"].command("truncate")
def convert_truncate(
    path: Directory,
    out: Annotated[str, typer.Argument(help="directory to create")],
    layers: Annotated[int, typer.Option(help="how many of the first layers to keep")],
) -> None:
    """Keep a model's first layers, byte for byte: a small model to try things on.

    Example: octo convert truncate Llama-3.2-1B tiny/ --layers 2
    """
    from megatron_octo.convert.api import truncate
    from megatron_octo.locations import locate

    truncate(locate(path), layers, locate(out))


@_apps["rl"].command("train")
def rl_train(file: Path) -> None:
    """Run the RL stage: the real OpenRLHF trainer for each run of the file.

    Example: octo rl train runs/demo/stages/rl.yaml
    """
    from megatron_octo.config.load import load_config
    from megatron_octo.config.rl import RLStageConfig
    from megatron_octo.rl.run import train_rl

    train_rl(load_config(RLStageConfig, file))


@_apps["rl"].command("command")
def rl_command(file: Path) -> None:
    """Print the OpenRLHF command line of every run and length stage.

    Example: octo rl command rl.yaml
    """
    import shlex

    from megatron_octo.config.load import load_config
    from megatron_octo.config.rl import RLStageConfig
    from megatron_octo.rl.argv import commands

    for command in commands(load_config(RLStageConfig, file)):
        typer.echo(shlex.join(command))


@_apps["eval"].command("run")
def eval_run(file: Path) -> None:
    """Answer held-out problems, greedy and sampled, and score the answers.

    Example: octo eval run runs/demo/stages/evaluate-base.yaml
    """
    from megatron_octo.config.evaluate import EvaluateConfig
    from megatron_octo.config.load import load_config
    from megatron_octo.evaluate.run import evaluate_models

    evaluate_models(load_config(EvaluateConfig, file))


@_apps["eval"].command("grade")
def eval_grade(file: Path, as_json: AsJson = False) -> None:
    """Grade a file of responses: one {"response", "answer", "stopped"} a line.

    Example: octo eval grade responses.jsonl
    """
    from megatron_octo.evaluate.run import grade_file

    _print(grade_file(file), as_json)


def _tokens(text: str) -> int:
    from megatron_octo.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--until") from None


def _finish(out: Path) -> None:
    typer.echo(f"report: {out / 'report' / 'index.html'}")


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(facts)
        return
    for key, value in facts.items():
        typer.echo(f"{key:24} {value}")


def _print_json(facts: Any) -> None:
    typer.echo(json.dumps(facts, indent=2, default=str))


def _end_on_sigterm(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


def _fail(error: OctoError) -> NoReturn:
    print(f"octo: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def main() -> None:
    """Entry point: an `OctoError` is one line on stderr and its exit code."""
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    # megatron-core warns of packages a machine without CUDA never has, torch of its own older interfaces.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        app()
    except OctoError as error:
        _fail(error)
    except Exception as error:
        problem = machine_problem(error)
        if problem is None:
            raise
        _fail(problem)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer ends with it on Ctrl-C, and says nothing
            print("octo: interrupted; the same command goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()

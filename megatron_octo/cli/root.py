"""The commands of all rooms but conversion, and the entry point."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from megatron_octo import __version__
from megatron_octo.cli import branch, convert, data, train
from megatron_octo.cli.shared import AsJson, Overrides, print_facts, print_json
from megatron_octo.errors import OctoError, machine_problem
from megatron_octo.runtime.stop import EXIT_CODES

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
    help="OctoThinker on Megatron-Core: mid-training, branches, conversion, PPO, evaluation.",
)  # fmt: skip
_groups = {
    "rl": "The OpenRLHF stage.",
    "eval": "Problems, answers, scores.",
    "campaign": "The whole tree of stages.",
}
_apps = {name: typer.Typer(no_args_is_help=True, help=text) for name, text in _groups.items()}
_apps |= {"data": data.app, "convert": convert.app, "branch": branch.app}
for _name, _app in _apps.items():
    app.add_typer(_app, name=_name)
app.command("train", epilog=EXIT_CODES.replace("\n", "\n\n"))(train.train)

_INTERRUPTED = 128 + signal.SIGINT

Out = Annotated[Path | None, typer.Option(help="directory to write")]


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
        print_json([vars(state) for _, state in rows])
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
    print_json(facts) if as_json else typer.echo(str(directory / "report" / "index.html"))


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

    print_facts(grade_file(file), as_json)


def _finish(out: Path) -> None:
    typer.echo(f"report: {out / 'report' / 'index.html'}")


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

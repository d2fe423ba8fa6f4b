"""`octo convert`: Hugging Face <-> Megatron checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from megatron_octo.cli.shared import AsJson, print_json
from megatron_octo.locations import locate

app = typer.Typer(
    no_args_is_help=True, help="Hugging Face <-> Megatron checkpoints, with a certificate; paths or URLs (s3://...)."
)

Place = Annotated[Any, typer.Argument(parser=locate)]
Layout = Annotated[str, typer.Option(help="octo, megatron-lm, megatron-bridge or nemo")]


@app.command("to-hf")
def to_hf(
    places: Annotated[
        list[Any],
        typer.Argument(help="CHECKPOINT OUT [CHECKPOINT OUT ...]; a run directory means its latest", parser=locate),
    ],
    tokenizer: Annotated[Any, typer.Option(help="tokenizer directory; by default the run's own", parser=locate)] = None,
    dtype: Annotated[str, typer.Option(help="source, fp32, bf16 or fp16")] = "source",
) -> None:
    """Convert checkpoints to Hugging Face directories, each with a certificate.

    Reads checkpoints of this project, Megatron-LM, Megatron-Bridge and NeMo 2; paths or URLs (s3://...).

    Example: octo convert to-hf runs/demo/long hf/long
    """
    from megatron_octo.convert import api

    if len(places) % 2:
        raise typer.BadParameter("give pairs: CHECKPOINT OUT")
    certificates = api.to_hf_many(zip(places[::2], places[1::2], strict=True), tokenizer, dtype)
    for out, certificate in zip(places[1::2], certificates, strict=True):
        typer.echo(f"{out}: {api.format_certificate(certificate)}")


@app.command("from-hf")
def from_hf(
    model: Place,
    out: Place,
    layout: Layout = "octo",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read pytorch_model.bin; values only, nothing in it is run")
    ] = False,
) -> None:
    """Convert a Hugging Face Llama, Qwen2.5 or Qwen3 to a checkpoint, by default one that `start.checkpoint` accepts.

    Example: octo convert from-hf Llama-3.2-1B start/
    """
    from megatron_octo.convert import api

    _say_written(out, api.from_hf(model, out, layout, allow_pickle))


@app.command("relayout")
def relayout(
    checkpoint: Place,
    out: Place,
    layout: Layout,
) -> None:
    """Write a checkpoint's weights in another trainer's layout, either way.

    Example: octo convert relayout runs/long long-mlm --layout megatron-lm
    """
    from megatron_octo.convert import api

    _say_written(out, api.relayout(checkpoint, out, layout))


@app.command("verify")
def verify(
    directory: Place,
    strict: Annotated[
        bool, typer.Option("--strict", help="also refuse unlisted files, other library versions, checks not repeated")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a converted model against its certificate, from scratch; exit code 5 if it does not hold.

    Example: octo convert verify runs/demo/hf/long --strict
    """
    from megatron_octo.convert import api

    report = api.verify(directory, strict)
    print_json(report) if as_json else typer.echo(api.format_verdict(report))


@app.command("show")
def show(path: Place, as_json: AsJson = False) -> None:
    """List the tensors of a checkpoint or a Hugging Face directory, without loading them.

    Example: octo convert show runs/demo/stable
    """
    from megatron_octo.convert import api

    report = api.show(path)
    print_json(report) if as_json else typer.echo(api.format_tree(report))


@app.command("diff")
def diff(a: Place, b: Place, as_json: AsJson = False) -> None:
    """Compare the tensors of two models of either format; exit code 1 if any differs.

    Example: octo convert diff runs/demo/stable runs/demo/long
    """
    from megatron_octo.convert import api

    report = api.diff(a, b)
    print_json(report) if as_json else typer.echo(api.format_diff(report))
    if not report["same"]:
        raise typer.Exit(1)


@app.command("average")
def average(
    places: Annotated[list[Any], typer.Argument(help="checkpoints or runs; with --last, one run", parser=locate)],
    out: Annotated[Any, typer.Option(help="checkpoint directory to create", parser=locate)],
    last: Annotated[int | None, typer.Option(help="average the newest K checkpoints of one run")] = None,
) -> None:
    """Average the weights of checkpoints into a new one.

    Example: octo convert average runs/long --last 3 --out runs/long-average
    """
    from megatron_octo.convert import api

    _say_written(out, api.average(places, out, last))


@app.command("truncate")
def truncate(
    path: Place,
    out: Place,
    layers: Annotated[int, typer.Option(help="how many of the first layers to keep")],
) -> None:
    """Keep a model's first layers, byte for byte: a small model to try things on.

    Example: octo convert truncate Llama-3.2-1B tiny/ --layers 2
    """
    from megatron_octo.convert import api

    api.truncate(path, layers, out)
    typer.echo(f"{out}: the first {layers} layers of {path}, byte for byte")


def _say_written(out: Any, facts: dict[str, Any]) -> None:
    model = facts["model"]
    typer.echo(f"{out}: a sealed checkpoint, {model['family']}, {model['layers']} layers, hidden {model['hidden']}")
    if facts.get("to_state"):
        typer.echo(f"{facts['layout']} does not take these over, state them: {' '.join(facts['to_state'])}")

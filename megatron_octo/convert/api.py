"""Conversions as commands: checkpoint -> Hugging Face with a certificate, and Hugging Face -> checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.store import read_facts
from megatron_octo.checkpoint.tensors import TensorSource
from megatron_octo.convert import hf_io
from megatron_octo.convert.certificate import (
    CERTIFICATE_FILE,
    certify,
    explain,
    format_certificate,
    format_verdict,
    require_valid,
    verify,
    versions,
    write_certificate,
)
from megatron_octo.convert.compare import diff, format_diff
from megatron_octo.convert.derive import average, truncate
from megatron_octo.convert.layouts import layout_of
from megatron_octo.convert.megatron_io import HUGGING_FACE, Origin, find_checkpoint, geometry, read_origin
from megatron_octo.convert.safetensors_io import SHARD_BYTES, write_safetensors
from megatron_octo.convert.show import format_tree, show
from megatron_octo.convert.tables import table_of
from megatron_octo.convert.views import AsHuggingFace, AsMegatron, Cast, Watched
from megatron_octo.errors import CertificateError, CheckpointError, ConfigError
from megatron_octo.files import hash_weights
from megatron_octo.locations import Location, in_words, reaching
from megatron_octo.publish import Partial, publishing, refuse_existing, tidy

__all__ = [
    "DTYPES", "average", "diff", "format_certificate", "format_diff", "format_tree", "format_verdict", "from_hf",
    "relayout", "show", "to_hf", "to_hf_many", "truncate", "verify",
]  # fmt: skip

DTYPES: dict[str, str | None] = {"source": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What a caller may ask for, and torch's name of it; "source" keeps the checkpoint's dtype."""

_READ = (".safetensors", ".bin", hf_io.CONFIG_FILE, ".index.json")


@in_words
def to_hf(
    checkpoint: Location,
    out: Location,
    tokenizer: Location | None = None,
    dtype: str = "source",
    shard_bytes: float = SHARD_BYTES,
) -> dict[str, Any]:
    """Write one checkpoint as a certified Hugging Face directory.

    Args:
        checkpoint: a sealed checkpoint, a run directory for its latest one, or a checkpoint of Megatron-LM,
            Megatron-Bridge or NeMo.
        out: directory to create. One that already is the complete conversion of this checkpoint is kept.
        tokenizer: tokenizer directory; the one the run was trained with if not given. As long as that one is there,
            another must give texts the same ids and end them with the same token.
        dtype: "source", "fp32", "bf16" or "fp16".
        shard_bytes: largest safetensors file.

    Returns:
        The certificate.

    Raises:
        ConfigError: unknown dtype, no tokenizer, or `out` exists and is something else.
        CheckpointError: the checkpoint is unsealed, altered or not there.
        CertificateError: the written directory did not pass its own checks; nothing is left of it.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}", f"known are {', '.join(DTYPES)}")
    origin = read_origin(find_checkpoint(checkpoint))
    tokens = _tokenizer(origin, tokenizer)
    kept = _kept(out, origin, tokens, DTYPES[dtype])
    if kept is not None:
        tidy(out)
        return kept
    refuse_existing(out)
    origin.require_intact()
    made_from = {"to_hf": origin.digest, "tokenizer": str(tokens), "dtype": dtype, "shard_bytes": shard_bytes}
    with publishing(out, made_from, last=CERTIFICATE_FILE) as partial:
        write_hf(origin, partial, tokens, DTYPES[dtype], shard_bytes)
        certificate = certify(origin, partial.directory, DTYPES[dtype])
        if not certificate["valid"]:
            raise CertificateError(
                f"{origin.checkpoint}: the conversion did not prove itself: {'; '.join(explain(certificate))}",
                "only a proven conversion is kept", "check the run's model section and tokenizer",
            )  # fmt: skip
        write_certificate(partial.directory, certificate)
    return certificate


def to_hf_many(
    pairs: Iterable[tuple[Location, Location]], tokenizer: Location | None = None, dtype: str = "source"
) -> list[dict]:
    """Convert several checkpoints in one process: starting one costs more than a small conversion.

    Args:
        pairs: (checkpoint or run directory, directory to create).
        tokenizer: as for `to_hf`, for all of them.
        dtype: as for `to_hf`.

    Returns:
        The certificates, in the order given.

    Raises:
        ConfigError: two targets are the same; and see `to_hf`. What was converted before stays.
    """
    pairs = list(pairs)
    targets = [out.resolve() for _, out in pairs]
    for out in targets:
        if targets.count(out) > 1:
            raise ConfigError(f"{out}: named as target twice", fix="give every checkpoint its own directory")
    return [to_hf(checkpoint, out, tokenizer, dtype) for checkpoint, out in pairs]


def write_hf(origin: Origin, partial: Partial, tokenizer: Location, dtype: str | None, shard_bytes: float) -> None:
    """Write all files of a model directory but the certificate.

    Args:
        origin: the checkpoint.
        partial: where to; shards it has finished are not written again.
        tokenizer: directory of the tokenizer and of what else travels with a model.
        dtype: torch's name of the dtype to write, None for the checkpoint's.
        shard_bytes: largest safetensors file.
    """
    tokens = hf_io.stated_tokens(tokenizer)  # first: it is soon read, and without it nothing is worth writing
    checkpoint = origin.tensors()
    weights = AsHuggingFace(
        table_of(origin.model.family), geometry(origin.model), Cast(checkpoint, dtype) if dtype else checkpoint
    )
    with Watched("export", weights) as watched:
        write_safetensors(partial, watched, shard_bytes)
    hf_io.carry(origin.assets, tokenizer, partial.directory)
    written = weights.dtype(next(iter(weights.shapes())))
    hf_io.write_configuration(partial.directory, origin.model, written, tokens)


@in_words
def from_hf(model_dir: Location, out: Location, layout: str = "octo", allow_pickle: bool = False) -> dict[str, Any]:
    """Write a Hugging Face model as a sealed weights-only checkpoint, for a run's `start.checkpoint`.

    Args:
        model_dir: `config.json` and safetensors; nothing in it is executed. Its tokenizer, generation settings and
            licence travel along, so that the checkpoint stands alone.
        out: checkpoint directory to create. One that already holds exactly this model is kept.
        layout: whose checkpoint to write: "octo", "megatron-lm", "megatron-bridge" or "nemo".
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors; values only, nothing in them is run.

    Returns:
        The checkpoint's `run.json`: the model, where it came from and the hashes of its files.

    Raises:
        DataError: files missing, damaged or pickled, tensors that do not cover the model, or a head that the
            configuration ties but that differs from the embedding.
        ConfigError: an architecture that cannot be trained faithfully, or `out` exists and is something else.
    """
    layout_of(layout).refuse(model := hf_io.read_model(model_dir))
    weights = hf_io.open_weights(model_dir, allow_pickle)
    source = {"directory": str(model_dir.resolve()), "files": _digests(model_dir)}
    if _written(out, layout, source):
        tidy(out)
        return read_facts(out)
    refuse_existing(out)
    megatron = AsMegatron(table_of(model.family), geometry(model), weights)
    facts = {"model": model, "source": source}
    return _write_megatron("import", megatron, out, layout, facts, lambda folder: hf_io.take_along(model_dir, folder))


@in_words
def relayout(checkpoint: Location, out: Location, layout: str) -> dict[str, Any]:
    """Write a checkpoint's weights in another trainer's layout: ours for Megatron-LM, theirs for us.

    Args:
        checkpoint: as for `to_hf`.
        out: checkpoint directory to create. One that already holds exactly these weights is kept.
        layout: as for `from_hf`.

    Returns:
        The new checkpoint's `run.json`.

    Raises:
        ConfigError: the layout cannot express the model, or `out` exists and is something else.
        CheckpointError: the checkpoint is unsealed, altered, incomplete or not there.
    """
    origin = read_origin(find_checkpoint(checkpoint))
    layout_of(layout).refuse(origin.model)
    if _written(out, layout, source := {"checkpoint": origin.lineage}):
        tidy(out)
        return read_facts(out)
    refuse_existing(out)
    origin.require_intact()
    weights = origin.tensors()
    AsHuggingFace(table_of(origin.model.family), geometry(origin.model), weights)  # refuses what is not the model
    facts = {"model": origin.model, "source": source, "tokens": origin.facts.get("tokens") or 0}
    return _write_megatron(
        "relayout", weights, out, layout, facts, lambda to: hf_io.carry(origin.assets, origin.tokenizer, to)
    )


def _write_megatron(
    label: str, weights: TensorSource, out: Location, layout: str, facts: dict[str, Any], carry: Callable[[Path], None]
) -> dict[str, Any]:
    """Write a model's weights as a sealed checkpoint in a layout, with what `carry` puts beside them."""
    from megatron_octo.checkpoint.dist_write import write_model

    target, model = layout_of(layout), facts["model"]
    dtype = weights.dtype(next(iter(weights.shapes())))

    def surround(directory: Path) -> None:
        carry(directory / HUGGING_FACE)
        carried = (directory / HUGGING_FACE).is_dir()
        target.write(directory, model, dtype, f"{out.resolve()}/{HUGGING_FACE}" if carried else None)

    facts = {**facts, "model": model.model_dump(mode="json"), "layout": layout, "versions": versions()}
    if arguments := target.to_state(model):
        facts["to_state"] = arguments
    with Watched(label, weights) as watched:
        write_model(
            out,
            watched,
            facts,
            made_from={"source": _content(facts["source"]), "layout": layout},
            places=target.places(weights.shapes()),
            objects=target.objects(model),
            extras=surround,
            into=target.into,
        )
    return read_facts(out)


def _tokenizer(origin: Origin, given: Location | None) -> Location:
    if given is None and origin.tokenizer is None:
        raise ConfigError(
            f"{origin.checkpoint}: no tokenizer is known for it",
            "the exported model's end-of-text token must be that of its training", "name it: --tokenizer DIR",
        )  # fmt: skip
    return given or origin.tokenizer  # type: ignore[return-value] - one of the two is set


def _kept(out: Location, origin: Origin, tokenizer: Location, dtype: str | None) -> dict[str, Any] | None:
    """The certificate of a target that already is this very conversion, else None."""
    try:
        certificate = require_valid(out)
    except CertificateError:
        return None
    wanted = dtype or certificate["dtype"]["checkpoint"]
    same = (
        certificate["lineage"]["seal"] == origin.digest
        and certificate["dtype"]["export"] == wanted
        and not hf_io.different_files(out, tokenizer, hf_io.TOKENIZER_FILES)
    )
    return certificate if same else None


def _written(out: Location, layout: str, source: dict[str, Any]) -> bool:
    """Whether a target already is an intact checkpoint of these weights in this layout."""
    try:
        verify_seal(out)
        facts = read_facts(out)
    except CheckpointError:
        return False
    return facts.get("layout") == layout and _content(facts.get("source") or {}) == _content(source)


def _content(source: dict[str, Any]) -> Any:
    """What a source holds, wherever it lies: the hashes of its files, or the checkpoint's own."""
    return source.get("files") or (source.get("checkpoint") or {}).get("seal")


def _digests(model_dir: Location) -> dict[str, dict[str, Any]]:
    """BLAKE3 and size of the files an import reads: weights, their index, configuration, and what travels along."""
    with reaching(model_dir):
        names = {path.name for path in model_dir.iterdir() if path.is_file()}
        wanted = sorted(name for name in names if name in hf_io.ASSET_FILES or name.endswith(_READ))
        return {
            name: {"blake3": hash_weights(model_dir / name), "bytes": (model_dir / name).stat().st_size}
            for name in wanted
        }

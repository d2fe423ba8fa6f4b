"""Conversions as commands: checkpoint -> Hugging Face with a certificate, and Hugging Face -> checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.seal import seal_digest, verify_seal
from megatron_octo.checkpoint.store import read_facts
from megatron_octo.config.run import ModelConfig
from megatron_octo.convert import hf_io
from megatron_octo.convert.certificate import (
    certify,
    explain,
    file_digests,
    require_valid,
    verify,
    versions,
    write_certificate,
)
from megatron_octo.convert.megatron_io import CheckpointTensors, Origin, find_checkpoint, geometry, read_origin
from megatron_octo.convert.rules import expand
from megatron_octo.convert.safetensors_io import SHARD_BYTES, Planned, SafetensorsDirectory, write_safetensors
from megatron_octo.convert.show import format_tree, show
from megatron_octo.convert.walk import export_tensors, import_tensors, table_of
from megatron_octo.errors import CertificateError, CheckpointError, ConfigError
from megatron_octo.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DTYPES", "format_tree", "from_hf", "show", "to_hf", "to_hf_many", "verify"]

DTYPES: dict[str, str | None] = {"source": None, "fp32": "float32", "bf16": "bfloat16"}
"""What a caller may ask for, and torch's name of it; "source" keeps the checkpoint's dtype."""

_OURS = {"float32": "fp32", "bfloat16": "bf16"}


def to_hf(
    checkpoint: Path, out: Path, tokenizer: Path | None = None, dtype: str = "source", shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write one checkpoint as a certified Hugging Face directory.

    Args:
        checkpoint: a sealed checkpoint, or a run directory for its latest one.
        out: directory to create. One that already is the complete conversion of this checkpoint is kept.
        tokenizer: tokenizer directory; the one the run was trained with if not given. As long as that one is there,
            another must give texts the same ids and end them with the same token.
        dtype: "source", "fp32" or "bf16".
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
        return kept
    hf_io.refuse_existing(out)
    verify_seal(origin.checkpoint)
    with hf_io.publishing(out) as partial:
        _write(origin, partial, tokens, DTYPES[dtype], shard_bytes)
        certificate = certify(origin, partial, DTYPES[dtype])
        if not certificate["valid"]:
            raise CertificateError(
                f"{origin.checkpoint}: the conversion did not prove itself: {'; '.join(explain(certificate))}",
                "only a proven conversion is kept", "check the run's model section and tokenizer",
            )  # fmt: skip
        write_certificate(partial, certificate)
    return certificate


def to_hf_many(pairs: Iterable[tuple[Path, Path]], tokenizer: Path | None = None, dtype: str = "source") -> list[dict]:
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
    pairs = [(Path(checkpoint), Path(out)) for checkpoint, out in pairs]
    targets = [out.resolve() for _, out in pairs]
    for out in targets:
        if targets.count(out) > 1:
            raise ConfigError(f"{out}: named as target twice", fix="give every checkpoint its own directory")
    certificates = []
    with Progress("convert", len(pairs), unit="models") as bar:
        for checkpoint, out in pairs:
            certificates.append(to_hf(checkpoint, out, tokenizer, dtype))
            bar.advance(1)
    return certificates


def from_hf(model_dir: Path, out: Path) -> dict[str, Any]:
    """Write a Hugging Face model as a sealed weights-only checkpoint, for a run's `start.checkpoint`.

    Args:
        model_dir: `config.json` and safetensors; nothing in it is executed.
        out: checkpoint directory to create. One that already holds exactly this model is kept.

    Returns:
        The checkpoint's `run.json`: the model, where it came from and the hashes of its files.

    Raises:
        DataError: files missing, damaged or pickled, tensors that do not cover the model, or a head that the
            configuration ties but that differs from the embedding.
        ConfigError: an architecture that cannot be trained faithfully, or `out` exists and is something else.
    """
    from megatron_octo.checkpoint.dist import write_model

    with SafetensorsDirectory(model_dir) as weights:
        model = hf_io.read_model(model_dir)
        source = {"directory": str(model_dir.resolve()), "files": file_digests(model_dir)}
        if _imported(out, source["files"]):
            return read_facts(out)
        hf_io.refuse_existing(out)
        table, size = table_of(model.family), geometry(model)
        out.parent.mkdir(parents=True, exist_ok=True)
        with Progress("import", len(expand(table, size)), unit="tensors") as bar:
            tensors = _counted(import_tensors(table, size, weights), bar)
            write_model(out, tensors, _facts_of_import(model, source, model_dir))
    return read_facts(out)


def _write(origin: Origin, out: Path, tokenizer: Path, dtype: str | None, shard_bytes: int) -> None:
    """All files of a model directory but the certificate."""
    model = origin.model
    table, size = table_of(model.family), geometry(model)
    weights = CheckpointTensors(origin.checkpoint, dtype)
    stored = weights.shapes()
    plan = [
        Planned(name, shape, weights.dtype(rule.megatron))
        for rule in expand(table, size)
        if rule.stored(size) and rule.megatron in stored
        for name, shape in zip(rule.sources, rule.source_shapes(size), strict=True)
    ]
    with Progress("export", len(plan), unit="tensors") as bar:
        write_safetensors(out, plan, _counted(export_tensors(table, size, weights), bar), shard_bytes)
    hf_io.copy_tokenizer(tokenizer, out)
    hf_io.write_configuration(out, model, _config_dtype(plan, origin), hf_io.tokenizer_facts(tokenizer))


def _config_dtype(plan: list[Planned], origin: Origin) -> str:
    dtype = plan[0].dtype
    if dtype not in _OURS:
        raise CheckpointError(f"{origin.checkpoint}: weights are {dtype}", f"exported are {', '.join(_OURS)}")
    return _OURS[dtype]


def _tokenizer(origin: Origin, given: Path | None) -> Path:
    if given is None and origin.tokenizer is None:
        raise ConfigError(
            f"{origin.checkpoint}: no tokenizer is known for it",
            "the exported model's end-of-text token must be that of its training", "name it: --tokenizer DIR",
        )  # fmt: skip
    return given or origin.tokenizer  # type: ignore[return-value] - one of the two is set


def _kept(out: Path, origin: Origin, tokenizer: Path, dtype: str | None) -> dict[str, Any] | None:
    """The certificate of a target that already is this very conversion, else None."""
    try:
        certificate = require_valid(out)
    except CertificateError:
        return None
    wanted = dtype or certificate["dtype"]["checkpoint"]
    same = (
        certificate["lineage"]["seal"] == seal_digest(origin.checkpoint)
        and certificate["dtype"]["export"] == wanted
        and not hf_io.different_files(out, tokenizer, hf_io.TOKENIZER_FILES)
    )
    return certificate if same else None


def _imported(out: Path, files: dict[str, Any]) -> bool:
    """Whether a target already is the intact import of files with these hashes."""
    try:
        verify_seal(out)
        return (read_facts(out).get("source") or {}).get("files") == files
    except CheckpointError:
        return False


def _facts_of_import(model: ModelConfig, source: dict[str, Any], model_dir: Path) -> dict[str, Any]:
    has_tokenizer = any((model_dir / name).is_file() for name in hf_io.TOKENIZER_FILES)
    return {
        "model": model.model_dump(mode="json"),
        "source": source,
        "tokenizer": str(model_dir.resolve()) if has_tokenizer else None,
        "versions": versions(),
    }


def _counted(tensors: Iterable[tuple[str, Tensor]], bar: Progress) -> Iterator[tuple[str, Tensor]]:
    for pair in tensors:
        yield pair
        bar.advance(1)

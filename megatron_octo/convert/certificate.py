"""The proof a converted model carries: what was checked, with which figures, and the hash of every file.

`certify` examines a written directory against the checkpoint it came from and knows nothing of how it was
written. `examine` repeats, without checkpoint and trainer, whatever can be repeated. `require_valid` is the
gate before RL: it reads hashes and the verdict only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_octo import __version__
from megatron_octo.checkpoint.tensors import TensorSource
from megatron_octo.config.load import parse_config
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import agreement, checks
from megatron_octo.convert.agreement import facts_of
from megatron_octo.convert.checks import attempt
from megatron_octo.convert.forward import megatron_outputs, probes, transformers_outputs
from megatron_octo.convert.megatron_io import Origin
from megatron_octo.convert.safetensors_io import SafetensorsDirectory
from megatron_octo.convert.shards import read_json
from megatron_octo.convert.views import Cast
from megatron_octo.errors import CertificateError, DataError, OctoError
from megatron_octo.files import hash_json, hash_weights, write_json
from megatron_octo.locations import Location, in_words

CERTIFICATE_FILE = "certificate.json"
FORMAT = 2
CHECKS = (
    "config", "coverage", "round_trip", "vocabulary", "tokenizer", "tied_head", "end_of_text", "rope", "logits",
)  # fmt: skip
"""The checks of a certificate, in the order they are made; each has `passed`, `faults` and figures."""

_NEED_CHECKPOINT = ("round_trip", "tokenizer")
"""Checks that only the checkpoint's machine can make; afterwards the files' hashes stand for them."""
_UNLISTED_ALLOWED = ("README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md")
_PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "tokenizers")
_FIX = "convert the checkpoint again: octo convert to-hf"


def certify(origin: Origin, directory: Path, dtype: str | None) -> dict[str, Any]:
    """Examine a written model directory against its checkpoint.

    Args:
        origin: the checkpoint and what its run says.
        directory: complete but for the certificate.
        dtype: torch's name of the dtype the export was cast to, None if not cast. Both forward passes see
            the weights as rounded to it.

    Returns:
        The certificate; `valid` says whether all checks passed, `failed` which did not.
    """
    model, checkpoint = origin.model, origin.tensors()
    weights = cache(partial(SafetensorsDirectory, directory))
    results = _examine_files(directory, model, weights, checkpoint) | {
        "round_trip": attempt(lambda: checks.check_round_trip(weights(), model, checkpoint, dtype)),
        "tokenizer": attempt(lambda: checks.check_tokenizer(directory, origin.tokenizer)),
    }
    exported = Cast(checkpoint, dtype) if dtype else checkpoint
    results |= _compare_outputs(model, directory, weights, exported)
    failed = [name for name in CHECKS if not results[name]["passed"]]
    first = next(iter(checkpoint.shapes()))
    content = {
        "format": FORMAT,
        "valid": not failed,
        "failed": failed,
        "lineage": origin.lineage,
        "model": model.model_dump(mode="json"),
        "dtype": {"checkpoint": checkpoint.dtype(first), "export": exported.dtype(first)},
        **{name: results[name] for name in CHECKS},
        "versions": versions(),
        "files": file_digests(directory),
    }
    return {**content, "self_sha256": hash_json(content)}


def explain(results: dict[str, Any]) -> list[str]:
    """One line for each failed check: its name and the faults it found."""
    failed = [name for name in CHECKS if name in results and not results[name]["passed"]]
    return [f"{name}: {'; '.join(results[name]['faults'])}" for name in failed]


def write_certificate(directory: Path, certificate: dict[str, Any]) -> None:
    """Write `certificate.json` into the directory it describes."""
    write_json(directory / CERTIFICATE_FILE, certificate)


@in_words
def require_valid(model_dir: Location) -> dict[str, Any]:
    """Let only a proven model pass: certificate present, unedited, valid, and every file as it was certified.

    Args:
        model_dir: a converted model.

    Returns:
        The certificate.

    Raises:
        CertificateError: names the file or field.
        EnvironmentProblem: a remote directory cannot be reached.
    """
    certificate = _read(model_dir)
    _refuse(model_dir, _verdict(certificate) + _hash_problems(model_dir, certificate))
    return certificate


@in_words
def examine(model_dir: Location, strict: bool = False) -> dict[str, Any]:
    """Repeat every check that needs neither checkpoint nor trainer.

    Args:
        model_dir: a converted model.
        strict: also count as problems any file that the certificate does not list, versions of libraries other
            than it was made with, and checks that could not be repeated.

    Returns:
        `valid`, `problems` (one line each), `not_repeated` (names of checks), and the repeated checks by name.

    Raises:
        CertificateError: there is no certificate, or it was edited.
        EnvironmentProblem: a remote directory cannot be reached.
    """
    certificate = _read(model_dir)
    model = parse_config(ModelConfig, certificate["model"], str(model_dir / CERTIFICATE_FILE))
    weights = cache(partial(SafetensorsDirectory, model_dir))
    results = _examine_files(model_dir, model, weights)
    results |= _repeat_outputs(model_dir, model, weights, certificate)
    problems = _verdict(certificate) + _hash_problems(model_dir, certificate, strict) + explain(results)
    not_repeated = [name for name in CHECKS if name not in results and name not in _NEED_CHECKPOINT]
    if strict:
        problems += [f"{name}: could not be repeated" for name in not_repeated]
        problems += _version_problems(certificate["versions"])
    return {
        "valid": not problems,
        "problems": problems,
        "not_repeated": not_repeated,
        "files": len(certificate["files"]),
        **results,
    }


def verify(model_dir: Location, strict: bool = False) -> dict[str, Any]:
    """Like `examine`, but a problem is an error.

    Raises:
        CertificateError: names every problem found.
    """
    report = examine(model_dir, strict)
    _refuse(model_dir, report["problems"])
    return report


def format_certificate(certificate: dict[str, Any]) -> str:
    """Say in a line what a new certificate holds."""
    tensors, logits = certificate["coverage"]["covered"], certificate["logits"]["max_abs_difference"]
    return f"{tensors} tensors, certified: bitwise round trip, logits differ by {logits:.1e}"


def format_verdict(report: dict[str, Any]) -> str:
    """Write a valid report of `verify` for people: a line for each check with its plain figures."""
    lines = [f"valid: {report['files']} files as certified, {sum(name in report for name in CHECKS)} checks repeated"]
    for name in (name for name in CHECKS if name in report):
        figures = {key: value for key, value in report[name].items() if key not in ("passed", "faults")}
        plain = ", ".join(f"{key} {value}" for key, value in figures.items() if not isinstance(value, list))
        lines.append(f"  ok  {name:12} {plain}")
    return "\n".join(lines + [f"  --  {name:12} could not be repeated here" for name in report["not_repeated"]])


def file_digests(directory: Location) -> dict[str, dict[str, Any]]:
    """BLAKE3 and size of every file of a directory; the certificate and hidden files are left out."""
    return {name: _digest(directory / name) for name in _names(directory) if not _is_hidden(name)}


def versions() -> dict[str, str]:
    """Versions of what a conversion depends on."""
    found = {"megatron_octo": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _examine_files(
    directory: Location,
    model: ModelConfig,
    weights: Callable[[], TensorSource],
    checkpoint: TensorSource | None = None,
) -> dict[str, Any]:
    """The checks that look at the directory's files, beside the checkpoint where that is at hand."""
    return {
        "config": attempt(lambda: checks.check_config(directory, model)),
        "coverage": attempt(lambda: checks.check_coverage(weights(), model, checkpoint)),
        "vocabulary": attempt(lambda: checks.check_vocabulary(directory, model, checkpoint)),
        "tied_head": attempt(lambda: checks.check_tied_head(directory, weights(), model)),
        "end_of_text": attempt(lambda: checks.check_end_of_text(directory)),
    }


def _compare_outputs(
    model: ModelConfig, directory: Location, weights: Callable[[], TensorSource], checkpoint: TensorSource
) -> dict[str, dict[str, Any]]:
    """RoPE and logits of the trainer's model and of transformers'."""
    batches = probes(model)
    try:
        # The directory first: where transformers cannot run it, the other pass would be for nothing.
        theirs = transformers_outputs(directory, model, weights(), batches)
        ours = megatron_outputs(model, checkpoint, batches)
    except OctoError as error:
        return {name: facts_of([f"not compared: {error}"]) for name in ("rope", "logits")}
    return {
        "rope": agreement.check_rope(ours.frequencies, theirs.frequencies, model),
        "logits": agreement.check_logits(ours, theirs, batches),
    }


def _repeat_outputs(
    model_dir: Location, model: ModelConfig, weights: Callable[[], TensorSource], certificate: dict[str, Any]
) -> dict[str, Any]:
    """RoPE and logits again, against the trainer's figures that the certificate recorded; nothing if it has none."""
    import torch

    if "reference" not in certificate["logits"]:
        return {}
    try:
        theirs = transformers_outputs(model_dir, model, weights(), probes(model))
    except OctoError as error:
        return {name: facts_of([f"not compared: {error}"]) for name in ("rope", "logits")}
    recorded = torch.tensor(certificate["rope"]["frequencies"])
    return {
        "rope": agreement.check_rope(recorded, theirs.frequencies, model),
        "logits": agreement.check_reference(theirs, certificate["logits"]["reference"]),
    }


def _read(model_dir: Location) -> dict[str, Any]:
    path = model_dir / CERTIFICATE_FILE
    if not model_dir.is_dir():
        raise CertificateError(f"{model_dir}: no such directory", fix="name a converted model's directory")
    if not path.is_file():
        raise CertificateError(f"{path}: missing", "only a model whose conversion is proven is used", _FIX)
    try:
        content = read_json(path)
    except DataError as error:
        raise CertificateError(error.what, "a certificate is JSON", _FIX) from None
    claimed = content.pop("self_sha256", None)
    if claimed != hash_json(content):
        raise CertificateError(f"{path}: self_sha256 does not fit its content", "a certificate is never edited", _FIX)
    if content.get("format") != FORMAT:
        raise CertificateError(f"{path}: format {content.get('format')!r}", f"this version reads format {FORMAT}", _FIX)
    return {**content, "self_sha256": claimed}


def _verdict(certificate: dict[str, Any]) -> list[str]:
    if certificate["valid"] is True:
        return []
    return [f"certificate.json: valid is false, failed: {', '.join(certificate['failed'])}"]


def _hash_problems(model_dir: Location, certificate: dict[str, Any], strict: bool = False) -> list[str]:
    listed, found = certificate["files"], _names(model_dir)
    problems = [f"{name}: missing" for name in listed if name not in found]
    problems += [
        f"{name}: changed since it was certified"
        for name, facts in listed.items()
        if name in found and _digest(model_dir / name) != facts
    ]
    strange = [name for name in found if name not in listed]
    allowed = [name for name in strange if not strict and (_is_hidden(name) or name in _UNLISTED_ALLOWED)]
    return problems + [f"{name}: not in the certificate" for name in strange if name not in allowed]


def _names(directory: Location) -> list[str]:
    """Every file of a directory but its certificate, relative to it."""
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != CERTIFICATE_FILE)


def _is_hidden(name: str) -> bool:
    """Whether a file belongs to a tool (version control, an unfinished conversion) and not to the model."""
    return any(part.startswith(".") for part in name.split("/"))


def _digest(path: Location) -> dict[str, Any]:
    return {"blake3": hash_weights(path), "bytes": path.stat().st_size}


def _version_problems(recorded: dict[str, str]) -> list[str]:
    here = versions()
    return [
        f"{name}: version {here[name]} here, {recorded.get(name)} when it was certified"
        for name in here
        if here[name] != recorded.get(name)
    ]


def _refuse(model_dir: Location, problems: list[str]) -> None:
    if problems:
        raise CertificateError(
            f"{model_dir}: {'; '.join(problems)}", "only a model whose conversion is proven is used", _FIX
        )

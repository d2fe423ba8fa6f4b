"""The proof a converted model carries: what was checked, with which figures, and the hash of every file.

`certify` examines a written directory against the checkpoint it came from and knows nothing of how it was
written. `examine` repeats, without checkpoint and trainer, whatever can be repeated. `require_valid` is the
gate before RL: it reads hashes and the verdict only.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_octo import __version__
from megatron_octo.config.load import parse_config
from megatron_octo.config.run import ModelConfig
from megatron_octo.convert import checks
from megatron_octo.convert.forward import megatron_outputs, probe_lengths, probe_prompts, transformers_outputs
from megatron_octo.convert.megatron_io import CheckpointTensors, Origin
from megatron_octo.convert.safetensors_io import read_json
from megatron_octo.errors import CertificateError, DataError
from megatron_octo.files import hash_file, hash_json, write_json

CERTIFICATE_FILE = "certificate.json"
FORMAT = 1
CHECKS = (
    "config", "coverage", "round_trip", "vocabulary", "tokenizer", "tied_head", "end_of_text", "rope", "logits",
)  # fmt: skip
"""The checks of a certificate, in the order they are made; each has `passed`."""

_UNLISTED_ALLOWED = ("README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md")
_PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "tokenizers")


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
    model, weights = origin.model, CheckpointTensors(origin.checkpoint, dtype)
    results = {
        "config": checks.attempt(partial(checks.check_config, directory, model)),
        "coverage": checks.attempt(partial(checks.check_coverage, directory, model)),
        "round_trip": checks.attempt(partial(checks.check_round_trip, directory, model, weights)),
        "vocabulary": checks.attempt(partial(checks.check_vocabulary, directory, model, weights)),
        "tokenizer": checks.attempt(partial(checks.check_tokenizer, directory, origin.tokenizer)),
        "tied_head": checks.attempt(partial(checks.check_tied_head, directory, model)),
        "end_of_text": checks.attempt(partial(checks.check_end_of_text, directory)),
    }
    results |= _compare_outputs(origin, directory, weights, results)
    failed = [name for name in CHECKS if not results[name]["passed"]]
    first = next(iter(weights.shapes()))
    content = {
        "format": FORMAT,
        "valid": not failed,
        "failed": failed,
        "lineage": origin.lineage,
        "model": model.model_dump(mode="json"),
        "dtype": {"checkpoint": weights.stored_dtype(first), "export": weights.dtype(first)},
        **results,
        "versions": versions(),
        "files": file_digests(directory),
    }
    return {**content, "self_sha256": hash_json(content)}


def explain(results: dict[str, Any]) -> list[str]:
    """One line for each failed check: its name and what it found."""
    return [_explain(name, results[name]) for name in CHECKS if name in results and not results[name]["passed"]]


def write_certificate(directory: Path, certificate: dict[str, Any]) -> None:
    """Write `certificate.json` into the directory it describes."""
    write_json(directory / CERTIFICATE_FILE, certificate)


def require_valid(model_dir: Path) -> dict[str, Any]:
    """Let only a proven model pass: certificate present, unedited, valid, and every file as it was certified.

    Args:
        model_dir: a converted model.

    Returns:
        The certificate.

    Raises:
        CertificateError: names the file or field.
    """
    certificate = _read(model_dir)
    problems = _hash_problems(model_dir, certificate)
    if certificate.get("valid") is not True:
        problems.insert(0, f"certificate.json: valid is false, failed: {', '.join(certificate.get('failed') or ['?'])}")
    _refuse(model_dir, problems)
    return certificate


def examine(model_dir: Path) -> dict[str, Any]:
    """Repeat every check that needs neither checkpoint nor trainer.

    Args:
        model_dir: a converted model.

    Returns:
        `valid`, `problems` (one line each), and the repeated checks by name.

    Raises:
        CertificateError: there is no certificate, or it was edited.
    """
    certificate = _read(model_dir)
    model = parse_config(ModelConfig, certificate["model"], str(model_dir / CERTIFICATE_FILE))
    hashes = _hash_problems(model_dir, certificate)
    results = {
        "config": checks.attempt(partial(checks.check_config, model_dir, model)),
        "coverage": checks.attempt(partial(checks.check_coverage, model_dir, model)),
        "vocabulary": checks.attempt(partial(checks.check_vocabulary, model_dir, model)),
        "tied_head": checks.attempt(partial(checks.check_tied_head, model_dir, model)),
        "end_of_text": checks.attempt(partial(checks.check_end_of_text, model_dir)),
    }
    if results["coverage"]["passed"] and results["config"]["passed"]:
        results |= _repeat_outputs(model_dir, model, certificate)
    problems = [*hashes, *explain(results)]
    if certificate["valid"] is not True:
        problems.insert(0, f"certificate.json: valid is false, failed: {', '.join(certificate['failed'])}")
    return {"valid": not problems, "problems": problems, "files": len(certificate["files"]), **results}


def verify(model_dir: Path) -> dict[str, Any]:
    """Like `examine`, but a problem is an error.

    Raises:
        CertificateError: names every problem found.
    """
    report = examine(model_dir)
    _refuse(model_dir, report["problems"])
    return report


def file_digests(directory: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file of a directory, the certificate left out."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / CERTIFICATE_FILE:
            facts = {"sha256": hash_file(path), "bytes": path.stat().st_size}
            digests[path.relative_to(directory).as_posix()] = facts
    return digests


def _compare_outputs(
    origin: Origin, directory: Path, weights: CheckpointTensors, before: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """RoPE and logits; not made where transformers could not even build the model the files are meant for."""
    if not (before["coverage"]["passed"] and before["round_trip"].get("tensors")):
        skipped = {"passed": False, "problem": "not compared: the files do not hold the model"}
        return {"rope": skipped, "logits": skipped}
    prompts = probe_prompts(origin.model, probe_lengths(origin.model))
    ours = megatron_outputs(origin.model, weights, prompts)
    try:
        theirs = transformers_outputs(directory, origin.model, prompts)
    except DataError as error:
        return {name: {"passed": False, "problem": str(error)} for name in ("rope", "logits")}
    return {
        "rope": checks.check_rope(ours.frequencies, theirs.frequencies, origin.model),
        "logits": checks.check_logits(ours, theirs, prompts),
    }


def _repeat_outputs(model_dir: Path, model: ModelConfig, certificate: dict[str, Any]) -> dict[str, Any]:
    """RoPE and logits again, against the trainer's figures that the certificate recorded."""
    import torch

    if "reference" not in certificate["logits"]:
        return {}
    try:
        prompts = probe_prompts(model, certificate["logits"]["prompt_lengths"])
        theirs = transformers_outputs(model_dir, model, prompts)
    except DataError as error:
        return {"logits": {"passed": False, "problem": str(error)}}
    recorded = torch.tensor(certificate["rope"]["frequencies"])
    return {
        "rope": checks.check_rope(recorded, theirs.frequencies, model),
        "logits": checks.check_reference(theirs, certificate["logits"]),
    }


def _read(model_dir: Path) -> dict[str, Any]:
    path = model_dir / CERTIFICATE_FILE
    fix = "convert the checkpoint again: octo convert to-hf"
    if not path.is_file():
        raise CertificateError(f"{path}: missing", "only a model whose conversion is proven is used", fix)
    try:
        content = read_json(path)
    except DataError as error:
        raise CertificateError(error.what, "a certificate is JSON", fix) from None
    claimed = content.pop("self_sha256", None)
    if claimed != hash_json(content):
        raise CertificateError(f"{path}: self_sha256 does not fit its content", "a certificate is never edited", fix)
    if content.get("format") != FORMAT:
        raise CertificateError(f"{path}: format {content.get('format')!r}", f"this version reads format {FORMAT}", fix)
    return {**content, "self_sha256": claimed}


def _hash_problems(model_dir: Path, certificate: dict[str, Any]) -> list[str]:
    listed, found = certificate["files"], file_digests(model_dir)
    problems = [f"{name}: missing" for name in listed if name not in found]
    problems += [
        f"{name}: changed since it was certified" for name in listed if name in found and found[name] != listed[name]
    ]
    strange = [name for name in found if name not in listed and not name.startswith(".")]
    return problems + [f"{name}: not in the certificate" for name in strange if name not in _UNLISTED_ALLOWED]


def _refuse(model_dir: Path, problems: list[str]) -> None:
    if problems:
        raise CertificateError(
            f"{model_dir}: {'; '.join(problems)}",
            "only a model whose conversion is proven is used",
            "convert the checkpoint again: octo convert to-hf",
        )


def _explain(name: str, facts: dict[str, Any]) -> str:
    if "problem" in facts:
        return f"{name}: {facts['problem']}"
    listed = [f"{key} {', '.join(value[:6])}" for key, value in facts.items() if isinstance(value, list) and value
              and all(isinstance(item, str) for item in value)]  # fmt: skip
    if listed:
        return f"{name}: {'; '.join(listed)}"
    plain = {key: value for key, value in facts.items() if key != "passed" and not isinstance(value, list)}
    return f"{name}: {', '.join(f'{key} {value}' for key, value in plain.items())}"


def versions() -> dict[str, str]:
    """Versions of what a conversion depends on."""
    found = {"megatron_octo": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found

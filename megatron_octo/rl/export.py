"""What OpenRLHF leaves -> a model directory like the one it began with.

OpenRLHF writes its config in transformers 5's spelling only, and under ZeRO 2 an explicit `lm_head.weight` beside
`tie_word_embeddings: true`. Here config and tokenizer are the starting model's, byte for byte except the dtype;
the weights alone are new, under the same names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_octo.errors import StageFailed

_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "certificate.json", "*.bin", "*.pt")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def export_model(trained: Path, start: Path, out: Path) -> None:
    """Write the model directory of a finished run; `out` appears complete or not at all.

    Args:
        trained: directory OpenRLHF saved.
        start: model directory the run began with.
        out: directory to make; replaced if it exists.

    Raises:
        StageFailed: the trained weights do not match the starting model's names or shapes, or are not finite, or
            there is no room for them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = _load(trained)
    _untie(weights, _load(start), trained)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(start, temporary, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        save_file(weights, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        _state_dtype(temporary / "config.json", weights)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StageFailed(f"{out}: the model could not be written ({error})", fix="make room for it") from error
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def _load(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(str(path))
    return weights


def _untie(weights: dict[str, Any], start: dict[str, Any], trained: Path) -> None:
    """Give `weights` exactly the names and shapes of `start`; a tied head's copy is dropped."""
    import torch

    if _HEAD in weights and _HEAD not in start:
        head = weights.pop(_HEAD)
        if _EMBEDDING in weights and not torch.equal(head, weights[_EMBEDDING]):
            raise StageFailed(f"{trained}: {_HEAD} differs from the embedding it is tied to")
    for name in sorted(weights.keys() | start.keys()):
        shapes = [tuple(side[name].shape) if name in side else None for side in (start, weights)]
        if shapes[0] != shapes[1]:
            raise StageFailed(f"{trained}: {name} has shape {shapes[1]}, the model began with {shapes[0]}")
        if not torch.isfinite(weights[name]).all():
            raise StageFailed(f"{trained}: {name} is not finite", "the run diverged", "lower actor.learning_rate")


def _state_dtype(config: Path, weights: dict[str, Any]) -> None:
    """Let the config name the dtype the weights now have, under whichever keys it uses."""
    values = json.loads(config.read_text(encoding="utf-8"))
    name = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in values:
            values[key] = name
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

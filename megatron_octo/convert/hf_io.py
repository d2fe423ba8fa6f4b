"""What surrounds the weights in a Hugging Face directory: configuration, tokenizer, generation settings, publication.

Nothing in a directory is ever executed: Python files are not copied, a model's `auto_map` is ignored, and a tokenizer
that names code of its own is refused, because OpenRLHF loads tokenizers with leave to run such code.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_octo.config.run import ModelConfig
from megatron_octo.convert.safetensors_io import read_json
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.files import write_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Every file a tokenizer may consist of; whatever is there is copied."""
TOKEN_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""Those of them that say which id a piece of text has."""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The ids a model directory must agree on, and the number of tokens (added ones included)."""

    size: int
    bos: int | None
    eos: int
    pad: int | None

    def as_dict(self) -> dict[str, int | None]:
        """The same as plain values."""
        return asdict(self)


def tokenizer_facts(directory: Path) -> TokenizerFacts:
    """Load a tokenizer the way the RL stage and evaluation will, and take its special ids.

    Args:
        directory: holds the tokenizer's files.

    Raises:
        DataError: `AutoTokenizer` cannot load it, it names code of its own, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{directory}: holds no tokenizer", fix="name a directory with tokenizer.json")
    settings = directory / TOKENIZER_CONFIG_FILE
    if settings.is_file() and "auto_map" in read_json(settings):
        raise DataError(f"{settings}: names code of its own (auto_map)", "model directories run no code", "remove it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a damaged file
        raise DataError(f"{directory}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{directory}: the tokenizer has no end-of-text token",
            "without it a model never learns where to stop", "set eos_token in tokenizer_config.json",
        )  # fmt: skip
    size = max(tokenizer.get_vocab().values()) + 1
    return TokenizerFacts(size, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def different_files(one: Path, other: Path, names: Iterable[str]) -> list[str]:
    """Which of the named files two directories do not hold alike; one that both lack is alike.

    JSON is compared by what it says, so that a file written anew with other indentation is the same.
    """
    return [name for name in names if _content(one / name) != _content(other / name)]


def _content(path: Path) -> object:
    if not path.is_file():
        return None
    return read_json(path) if path.suffix == ".json" else path.read_bytes()


def write_configuration(directory: Path, model: ModelConfig, dtype: str, tokens: TokenizerFacts) -> None:
    """Write `config.json` and `generation_config.json` with the tokenizer's special ids in both.

    Args:
        directory: the model directory.
        model: the architecture.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        tokens: the tokenizer's facts.
    """
    from megatron_octo.model.hugging_face import to_hf_config

    values = to_hf_config(model, dtype, bos=tokens.bos, eos=tokens.eos, pad=tokens.pad)
    write_json(directory / CONFIG_FILE, values)
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    write_json(directory / GENERATION_FILE, {key: value for key, value in ids.items() if value is not None})


def read_model(directory: Path) -> ModelConfig:
    """The architecture a directory's `config.json` states.

    Raises:
        DataError: the file is missing or not JSON.
        ConfigError: an architecture this project does not have.
    """
    from megatron_octo.model.hugging_face import from_hf_config

    return from_hf_config(read_json(directory / CONFIG_FILE))


def end_of_text(directory: Path) -> dict[str, Any]:
    """The end-of-text id by each file that states one; `agree` when all three are the same single id."""
    stated = {
        "tokenizer": tokenizer_facts(directory).eos,
        "config": read_json(directory / CONFIG_FILE).get("eos_token_id"),
        "generation_config": read_json(directory / GENERATION_FILE).get("eos_token_id"),
    }
    return {**stated, "agree": len({str(value) for value in stated.values()}) == 1}


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Build a directory under a temporary name beside its target and rename it when all went well.

    Args:
        target: must not exist. What a killed conversion left under the temporary name is removed first.

    Raises:
        ConfigError: the target exists.
    """
    refuse_existing(target)
    partial = target.parent / f".{target.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        refuse_existing(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: the target exists.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: already exists", "a conversion never writes over another", "name another target")

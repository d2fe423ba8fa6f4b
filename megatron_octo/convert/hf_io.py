"""A Hugging Face directory: how its weights are opened, and its configuration, tokenizer and generation settings.

Nothing in a directory is ever executed: Python files are not copied, a model's `auto_map` is ignored, and a tokenizer
that names code of its own is refused, because OpenRLHF loads tokenizers with leave to run such code.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.checkpoint.tensors import TensorSource
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.pickled import PickledDirectory
from megatron_octo.convert.safetensors_io import INDEX_FILE, SINGLE_FILE, SafetensorsDirectory
from megatron_octo.convert.shards import read_json
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.files import write_json
from megatron_octo.locations import Location, local_copy, reaching

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Every file a tokenizer may consist of; whatever is there is copied."""
ASSET_FILES = (
    *TOKENIZER_FILES, GENERATION_FILE,
    "LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY", "USE_POLICY.txt", "USE_POLICY.md",
    "NOTICE", "NOTICE.txt", "NOTICE.md",
)  # fmt: skip
"""What travels with a model from format to format: tokenizer, generation settings, and what its licence asks for."""
TOKEN_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""Those of a tokenizer's files that say which id a piece of text has."""

_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that have no token but those their files state."""


_OF_CHECKPOINTS = ("seal.json", "run.json", ".metadata", "latest", "checkpoints", "latest_checkpointed_iteration.txt")
"""What lies in checkpoints and run directories, and in no model directory."""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The ids a model directory must agree on, and the number of tokens (added ones included)."""

    size: int
    bos: int | None
    eos: int
    pad: int | None


def open_weights(directory: Location, allow_pickle: bool = False) -> TensorSource:
    """The weights of a model directory.

    Args:
        directory: holds safetensors, or, where they are allowed, pickled weights.
        allow_pickle: read pickled weights where there are no safetensors. Nothing in them is ever run.

    Raises:
        DataError: see `SafetensorsDirectory` and `PickledDirectory`.
        EnvironmentProblem: a remote directory cannot be reached.
    """
    with reaching(directory):
        safe = any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return PickledDirectory(directory) if allow_pickle and not safe else SafetensorsDirectory(directory)


def tokenizer_facts(directory: Location) -> TokenizerFacts:
    """Load a tokenizer the way the RL stage and evaluation will, and take its special ids.

    Args:
        directory: holds the tokenizer's files.

    Raises:
        DataError: `AutoTokenizer` cannot load it, it names code of its own, or it has no end-of-text token.
        EnvironmentProblem: a remote directory cannot be reached.
    """
    with local_copy(directory, (*TOKENIZER_FILES, CONFIG_FILE)) as here:
        tokenizer = _load_tokenizer(here, str(directory))
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{directory}: the tokenizer has no end-of-text token",
            "without it a model never learns where to stop", "set eos_token in tokenizer_config.json",
        )  # fmt: skip
    size = max(tokenizer.get_vocab().values()) + 1
    return TokenizerFacts(size, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def stated_tokens(directory: Location) -> TokenizerFacts:
    """The ids a tokenizer's files state: `tokenizer_facts` without the two seconds `AutoTokenizer` takes.

    What is written with them is held against the loaded tokenizer by the certificate.

    Args:
        directory: as for `tokenizer_facts`, and with its errors.
    """
    from tokenizers import Tokenizer

    settings, table = directory / TOKENIZER_CONFIG_FILE, directory / "tokenizer.json"
    if not (settings.is_file() and table.is_file()):
        return tokenizer_facts(directory)
    _refuse_code(directory, [TOKENIZER_CONFIG_FILE])
    stated = read_json(settings)
    keys = ("bos_token", "eos_token", "pad_token")
    if stated.get("tokenizer_class") not in _PLAIN_CLASSES and not all(key in stated for key in keys):
        return tokenizer_facts(directory)  # the class may have tokens of its own
    texts = [value.get("content") if isinstance(value := stated.get(key), dict) else value for key in keys]
    try:
        tokens = Tokenizer.from_str(table.read_text(encoding="utf-8"))
        bos, eos, pad = (tokens.token_to_id(text) if text else None for text in texts)
    except Exception:
        return tokenizer_facts(directory)  # says what is wrong
    return tokenizer_facts(directory) if eos is None else TokenizerFacts(tokens.get_vocab_size(), bos, eos, pad)


def _load_tokenizer(directory: Path, where: str) -> Any:
    from transformers import AutoTokenizer

    found = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not found:
        raise DataError(f"{where}: holds no tokenizer", fix="name a directory with tokenizer.json")
    _refuse_code(directory, found)
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"{where}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from None


def copy_assets(source: Location, target: Path, names: Iterable[str] = ASSET_FILES) -> None:
    """Copy what travels with a model beside its weights, as it is; never Python.

    Args:
        source: a model directory, or what was copied from one.
        target: made if missing; stays away where there is nothing to copy.
        names: those of `ASSET_FILES` that are wanted.

    Raises:
        DataError: a file names code of its own; nothing is copied.
        EnvironmentProblem: a remote source cannot be reached.
    """
    with reaching(source):
        found = [name for name in names if (source / name).is_file()]
        _refuse_code(source, found)
        for name in found:
            target.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((source / name).read_bytes())


def carry(assets: Location | None, tokenizer: Location | None, target: Path) -> None:
    """Copy what a model has beside its weights: settings and licence of its own, then its tokenizer.

    Args:
        assets: what was carried with the model before, if anything.
        tokenizer: directory of its tokenizer, and of the rest where nothing was carried before.
        target: see `copy_assets`.
    """
    if assets is not None:
        others = [name for name in ASSET_FILES if name not in TOKENIZER_FILES]
        copy_assets(assets, target, ASSET_FILES if tokenizer is None else others)
    if tokenizer is not None:
        copy_assets(tokenizer, target, ASSET_FILES if assets is None else TOKENIZER_FILES)


def take_along(model_dir: Location, target: Path) -> None:
    """Copy what travels with a model, and the ids it stops at where only its `config.json` states them."""
    copy_assets(model_dir, target)
    stops = read_json(model_dir / CONFIG_FILE).get("eos_token_id")
    if isinstance(stops, list) and not (target / GENERATION_FILE).is_file():
        write_json(target / GENERATION_FILE, {"eos_token_id": _ids(stops, model_dir / CONFIG_FILE)})


def different_files(one: Location, other: Location, names: Iterable[str]) -> list[str]:
    """Which of the named files two directories do not hold alike; one that both lack is alike.

    JSON is compared by what it says, so that a file written anew with other indentation is the same.
    """
    return [name for name in names if _content(one / name) != _content(other / name)]


def write_configuration(directory: Path, model: ModelConfig, dtype: str, tokens: TokenizerFacts) -> None:
    """Write `config.json` and `generation_config.json` with the same special ids in both.

    A model may stop at more tokens than its tokenizer's end of text: those a carried `generation_config.json` lists
    are kept if that token is among them, else it alone counts.

    Args:
        directory: the model directory. The other settings of a `generation_config.json` in it are kept.
        model: the architecture.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        tokens: the tokenizer's facts.

    Raises:
        DataError: the carried file is damaged.
    """
    from megatron_octo.model.hugging_face import to_hf_config

    path = directory / GENERATION_FILE
    carried = read_json(path) if path.is_file() else {}
    stops = _ids(carried.get("eos_token_id"), path)
    stops = stops if tokens.eos in stops else [tokens.eos]
    ids = {
        "bos": carried.get("bos_token_id") if tokens.bos is None else tokens.bos,
        "eos": stops if len(stops) > 1 else stops[0],
        "pad": carried.get("pad_token_id") if tokens.pad is None else tokens.pad,
    }
    write_json(directory / CONFIG_FILE, to_hf_config(model, dtype, **ids))
    stated = {f"{name}_token_id": value for name, value in ids.items() if value is not None}
    write_json(path, {**carried, **stated})


def read_model(directory: Location) -> ModelConfig:
    """The architecture a directory's `config.json` states.

    Raises:
        DataError: the file is missing or not JSON.
        ConfigError: an architecture this project does not have.
    """
    from megatron_octo.model.hugging_face import from_hf_config

    path = directory / CONFIG_FILE
    with reaching(directory):
        if not directory.is_dir():
            hint = "name a Hugging Face model directory; from the hub: hf download NAME --local-dir DIR"
            raise DataError(f"{directory}: no such directory", fix=hint)
        if not path.is_file() and any((directory / name).exists() for name in _OF_CHECKPOINTS):
            raise DataError(
                f"{directory}: a checkpoint or a run, not a Hugging Face directory",
                fix="for the way back: octo convert to-hf; for another trainer: octo convert relayout",
            )
    try:
        return from_hf_config(read_json(path))
    except ConfigError as error:  # it names the file as `config.json`
        raise ConfigError(f"{directory}/{error.what}", error.rule, error.fix) from None


def end_of_text(directory: Path) -> dict[str, Any]:
    """The end-of-text id or ids by each file that states them.

    Returns:
        `tokenizer`, `config`, `generation_config`; and `agree`: the two configurations say the same, and the
        tokenizer's id is among what they say.
    """
    tokenizer = tokenizer_facts(directory).eos
    config = read_json(directory / CONFIG_FILE).get("eos_token_id")
    generation = read_json(directory / GENERATION_FILE).get("eos_token_id")
    agree = config == generation and tokenizer in _ids(config, directory / CONFIG_FILE)
    return {"tokenizer": tokenizer, "config": config, "generation_config": generation, "agree": agree}


def _ids(value: Any, path: Path) -> list[int]:
    """Token ids as a list, from one, several or none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in ids):
        raise DataError(f"{path}: eos_token_id = {reprlib.repr(value)}", "it is a token's id or a list of them")
    return ids


def _refuse_code(directory: Location, names: Collection[str]) -> None:
    for name in (TOKENIZER_CONFIG_FILE, GENERATION_FILE):
        if name in names and "auto_map" in read_json(directory / name):
            raise DataError(
                f"{directory / name}: names code of its own (auto_map)", "model directories run no code", "remove it"
            )


def _content(path: Location) -> object:
    if not path.is_file():
        return None
    return read_json(path) if path.name.endswith(".json") else path.read_bytes()

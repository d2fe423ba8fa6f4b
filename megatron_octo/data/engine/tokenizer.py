"""The tokenizer of a build: where the given one lies, and what a user should hear about it."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_octo.config.data import DataBuildConfig, TokenizerConfig, expand_path
from megatron_octo.data.index.digest import TOKENIZER_FILES
from megatron_octo.data.index.encode import Encoder, load_encoder

_SAMPLE = "Question: what is 2 + 2?\n\nAnswer:  4,\n\tas \\(2 + 2 = 4\\)."


def given_tokenizer(tokenizer: TokenizerConfig) -> Path | None:
    """The directory or model file of a tokenizer that is taken over; None where one is trained.

    A `tokenizer.json` stands for its directory, where `tokenizer_config.json` names its marks.

    Raises:
        ConfigError: the path names an environment variable that is not set.
    """
    if tokenizer.path is None:
        return None
    path = expand_path(tokenizer.path, "tokenizer.path").absolute()
    return path.parent if path.name == TOKENIZER_FILES[0] and not path.is_dir() else path


def tell_lossy(config: DataBuildConfig) -> None:
    """Say so if a given tokenizer does not give a sample back, line breaks among it: no model could learn what is lost.

    White space at both ends does not count: some tokenizers put a space before every text.
    """
    path = given_tokenizer(config.tokenizer)
    if path is None:
        return
    shown = _round_trip(load_encoder(path, config.index))
    if shown.strip() != _SAMPLE.strip():
        print(f"octo: note: {path} loses what texts hold: {_SAMPLE!r} comes back as {shown!r}", file=sys.stderr)


def _round_trip(encoder: Encoder) -> str:
    tokens = next(encoder.documents([_SAMPLE]))
    return encoder.decode(tokens[encoder.begin is not None : len(tokens) - (encoder.end is not None)])


def tell_smaller(config: DataBuildConfig, vocabulary: int) -> None:
    """Say so if a trained tokenizer has fewer entries than it was asked for: its texts have no more pieces to merge."""
    train = config.tokenizer.train
    if train is not None and vocabulary < train.vocabulary_size:
        print(
            f"octo: note: the tokenizer has {vocabulary:,} entries, fewer than tokenizer.train.vocabulary_size = "
            f"{train.vocabulary_size:,}: its texts give no more; the run's vocabulary follows the tokenizer: "
            f"model.vocabulary: {vocabulary}",
            file=sys.stderr,
        )

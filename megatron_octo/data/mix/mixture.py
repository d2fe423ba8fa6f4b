"""The sources of a mixture: opened and checked before anything is read from them."""

from __future__ import annotations

from pathlib import Path

from megatron_octo.config.mixture import DataConfig
from megatron_octo.data.index.digest import stray_token
from megatron_octo.data.index.encode import vocabulary_of
from megatron_octo.data.index.pairs import Index, bin_path, read_index
from megatron_octo.errors import DataError

_SCANNED = 256 * 2**20


def windows_per_epoch(tokens: int, sequence_length: int) -> int:
    """Whole windows one pass over a source gives: each needs its length and one token more for the last label."""
    return max(0, (tokens - 1) // sequence_length)


def open_source(data: DataConfig, name: str, checked: bool = False) -> Index:
    """Open one source of a run's mixtures.

    Args:
        data: what the run reads.
        name: of the source.
        checked: whether another process has checked its files just now.

    Raises:
        DataError: its pair of files is missing or damaged, or has fewer tokens than one window needs.
    """
    index = read_index(data.paths[name], checked)
    if not windows_per_epoch(index.tokens, data.sequence_length):
        raise DataError(
            f"data.mixture.{name} ({index.prefix}) has {index.tokens} tokens in {index.documents} documents",
            f"one window of data.sequence_length = {data.sequence_length} needs {data.sequence_length + 1}",
            "shorten the sequence, build more data, or drop the source",
        )
    return index


def check_tokenizer(data: DataConfig, vocabulary: int) -> None:
    """Check that every entry of the tokenizer is a row of the model's embedding.

    Raises:
        DataError: it has more entries than the model has rows.
    """
    size = vocabulary_of(data.tokenizer)
    if size > vocabulary:
        raise DataError(
            f"data.tokenizer {data.tokenizer} has {size} entries, model.vocabulary is {vocabulary}",
            "every token needs a row of the embedding",
            f"set model.vocabulary to {size} or name the model's own tokenizer",
        )


def check_tokens(prefix: Path, field: str, vocabulary: int) -> bool:
    """Check that every token of an indexed dataset is a row of the model's embedding, where that takes a moment only.

    Args:
        prefix: path of the pair without suffix.
        field: where a configuration names it.
        vocabulary: rows of the model's embedding without padding.

    Returns:
        Whether its tokens were looked at: those of files above 256 MiB are checked as they are read (train.data).

    Raises:
        DataError: it holds a larger token, or one below 0.
    """
    if bin_path(prefix).stat().st_size > _SCANNED:
        return False
    stray = stray_token(read_index(prefix).all_tokens(), vocabulary)
    if stray is not None:
        raise DataError(
            f"{field} ({prefix}) holds token {stray}, model.vocabulary is {vocabulary}",
            "every token needs a row of the embedding",
            "build the data with this model's tokenizer; if it was, the file is damaged: build it again",
        )
    return True

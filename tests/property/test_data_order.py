"""Properties of the mixture's arithmetic and of text that passes through the tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_octo.config.blends import Blend
from megatron_octo.data.index.encode import Encoder, load_encoder
from megatron_octo.data.index.train_tokenizer import SPECIAL_TOKENS, train_tokenizer
from megatron_octo.data.mix.mixture import windows_per_epoch
from megatron_octo.data.mix.order import order

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(
        train_tokenizer(["Ana has 7 books, finds 3. How many now? 10"], 300, tmp_path_factory.mktemp("t"))
    )


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, windows=st.integers(1, 400), more=st.integers(0, 300))
def test_shares_are_kept_and_longer_orders_start_alike(weights: list[float], windows: int, more: int) -> None:
    shares = (np.array(weights) / np.sum(weights)).tolist()
    blends = [Blend(0, {f"{place}": share for place, share in enumerate(shares)})]
    short, long = order(blends, windows), order(blends, windows + more)
    assert np.array_equal(long.source[:windows], short.source) and np.array_equal(long.number[:windows], short.number)
    counts = np.bincount(short.source, minlength=len(shares))
    assert np.all(np.abs(counts - np.array(shares) * windows) <= len(shares))
    for source in range(len(shares)):
        assert short.number[short.source == source].tolist() == list(range(counts[source]))


@given(tokens=st.integers(0, 10**12), length=st.integers(1, 10**6))
def test_windows_and_their_last_label_fit(tokens: int, length: int) -> None:
    windows = windows_per_epoch(tokens, length)
    assert windows * length + 1 <= max(tokens, 1)
    assert (windows + 1) * length + 1 > tokens


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.text(st.characters(codec="utf-8")), st.sampled_from(SPECIAL_TOKENS)), max_size=5))
def test_documents_end_once_and_marks_in_text_stay_text(encoder: Encoder, parts: list[str]) -> None:
    text = "".join(parts) or " "  # an empty text has no tokens, and is no document
    [tokens] = encoder.documents([text])
    assert tokens[-1] == encoder.end and encoder.end not in tokens[:-1]
    assert not {0, 1} & set(tokens)
    assert encoder.decode(tokens[:-1]) == text


def test_batches_do_not_change_documents(encoder: Encoder) -> None:
    texts = [f"Ana has {number} books" for number in range(1500)]
    assert list(encoder.documents(texts)) == [next(encoder.documents([text])) for text in texts]


def test_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    from megatron_octo.errors import DataError

    for content, message in ((None, "does not exist"), ("{}", "is not a tokenizer")):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=f"tokenizer.json {message}"):
            load_encoder(tmp_path)

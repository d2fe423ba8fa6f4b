"""Texts that are cut into words together have the words that they have alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_octo.data.clean.words import Batch, words_of

TEXTS = st.lists(st.text(st.sampled_from("ab1 \n\\-,>${}\u00e9\u2212\u0301\x01."), max_size=30), max_size=6)


@given(TEXTS)
def test_a_batch_is_its_texts(texts: list[str]) -> None:
    batch = Batch(texts)
    for number, text in enumerate(texts):
        alone = words_of(text)
        assert batch[number].hashes.tolist() == alone.hashes.tolist()
        assert [batch[number].shown(place, 1) for place in range(len(alone))] == [
            alone.shown(place, 1) for place in range(len(alone))
        ]

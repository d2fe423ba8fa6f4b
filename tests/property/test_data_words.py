"""The table of words gives the tokens of the tokenizers library, for every cut it claims to know."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_octo.data.index import words
from megatron_octo.data.index.words import WordEncoder, letters_of_bytes

TEXTS = [
    "We'll see: don't say it's 12345 (or 67.89)!\n\nThen x² + y² ≤ ½, naïve café — “quotes”…  \t tab\r\nΑλφα βήτα 数学",
    "function f(x) {\n    return x ** 2;\n}\n\n\n  THEY'RE I'M 's 'S 'll'LL \u017f's",
]
SPECIAL = ["<|end_of_text|>", "<|begin_of_text|>"]


def _cuts() -> dict[str, Any]:
    def split(expression: str) -> Any:
        return pre_tokenizers.Split(Regex(expression), "isolated")

    def level(use_regex: bool) -> Any:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)

    known = {"llama3": words._LLAMA3, "qwen2": words._QWEN2, "gpt2-split": words._GPT2}
    return {
        **{name: pre_tokenizers.Sequence([split(text), level(False)]) for name, text in known.items()},
        "gpt2": level(True),
        "ours": pre_tokenizers.Sequence([split(words._DIGITS), level(True)]),
    }


def _tokenizer(name: str, composed: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = _cuts()[name], decoders.ByteLevel()
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tools>", normalized=True)])
    return tokenizer


def _encoder(tokenizer: Tokenizer, text: bool = True) -> WordEncoder:
    tokenizer.encode_special_tokens = text
    found = WordEncoder.of(tokenizer, json.loads(tokenizer.to_str()), np.dtype(np.int32), text)
    assert found is not None
    return found


def _library(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _table(encoder: WordEncoder, text: str) -> list[int]:
    return np.frombuffer(encoder.encode(text), np.int32).tolist()


@pytest.fixture(scope="module", params=list(_cuts()))
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, WordEncoder]:
    tokenizer = _tokenizer(request.param)
    return tokenizer, _encoder(tokenizer)


SIGNS = st.sampled_from(
    [*" \t\n\r\x0b\x0c\x1c\x85\u00a0\u2009\u2028\u3000", *"aZé'sStTlLdDmMvV019²½ⅷ٣數ß\u0301_-.,!$\\{}()<>|"]
)
PIECES = st.one_of(
    SIGNS, st.text(max_size=4), st.text(st.characters(max_codepoint=0x7F), max_size=8),
    st.sampled_from([*SPECIAL, "<tool>", "<tools>", "'re", "  ", "\r\n", "   \n  ", "1234567", "🙂"]),
    st.sampled_from(["\u017f", "\u212a"]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(PIECES, max_size=12))
@example(parts=TEXTS)
@example(parts=["a  5", " \n 5\n", "  ", "b"])
def test_tokens_are_the_librarys(both: tuple[Tokenizer, WordEncoder], parts: list[str]) -> None:
    tokenizer, encoder = both
    assert _table(encoder, "".join(parts)) == _library(tokenizer, "".join(parts))


def test_every_character_of_the_plane_is_cut_as_the_library_cuts_it() -> None:
    """Each one between letters, digits, spaces and signs: its class decides what it joins."""
    tokenizer = _tokenizer("llama3")
    encoder = _encoder(tokenizer)
    known = sorted(words._known())
    assert len(known) > 60_000
    for first in range(0, len(known), 4096):
        text = "".join(f"a{c}b 1{c}2 {c} .{c}\n{c}{c}" for c in map(chr, known[first : first + 4096]))
        assert encoder._encode(text) == np.array(_library(tokenizer, text), np.int32).tobytes(), hex(known[first])
    assert not any(encoder._is_for_library(chr(code)) for code in known)


def test_what_the_two_could_see_differently_is_left_to_the_library() -> None:
    encoder = _encoder(_tokenizer("llama3"))
    unassigned = chr(next(code for code in range(0x370, 0xFFFF) if code not in words._known()))
    for sign in ("🙂", "\u017f", "\u212a", unassigned, "<tool>", "<tools>"):
        assert encoder._is_for_library(f"text {sign} more")
    for sign in ("<|end_of_text|>", "é", "≤", "数", ""):
        assert not encoder._is_for_library(f"text {sign} more")
    assert _encoder(_tokenizer("llama3"), text=False)._is_for_library("a <|end_of_text|> b")


@pytest.mark.parametrize("text", [True, False])
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(PIECES, st.sampled_from(["e\u0301", "é", "\u1100\u1161", "A\u030a"])), max_size=8))
def test_composed_characters_and_marks(text: bool, parts: list[str]) -> None:
    tokenizer = _COMPOSED
    encoder = _encoder(tokenizer, text)
    assert _table(encoder, "".join(parts)) == _library(tokenizer, "".join(parts))


_COMPOSED = _tokenizer("qwen2", composed=True)


@pytest.mark.parametrize("name", list(_cuts()))
def test_long_texts_are_cut_where_it_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _tokenizer(name)
    encoder = _encoder(tokenizer)
    monkeypatch.setattr(words, "_STRETCH", 50)
    text = "".join(TEXTS * 4) + " \n " * 40 + "🙂 some words, then <tool> and 12345 a b c d " * 9
    parts = list(words._stretches(text))
    assert len(parts) > 8 and "".join(parts) == text
    assert _table(encoder, text) == _library(tokenizer, text)


def test_the_table_starts_over_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _tokenizer("gpt2")
    encoder = _encoder(tokenizer)
    monkeypatch.setattr(words, "_KEPT", 10)
    text = " ".join(f"word{number}x" for number in range(200)) + " y" * 100 + "z" * 500
    assert _table(encoder, text) == _library(tokenizer, text)
    assert len(encoder._words) <= 10 and max(map(len, encoder._words)) <= words._LONGEST


def test_bytes_have_the_librarys_letters() -> None:
    assert sorted(letters_of_bytes()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(chr(code) for code in range(0x800)) + "ࠀ\uffff\U00010000\U0010ffff"
    [(letters, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert letters == "".join(letters_of_bytes()[byte] for byte in text.encode())


def test_other_tokenizers_are_left_to_the_library() -> None:
    form = json.loads(_tokenizer("llama3").to_str())
    level = form["pre_tokenizer"]["pretokenizers"][1]

    def known(**changes: Any) -> bool:
        tokenizer = Tokenizer.from_str(json.dumps(form))
        return WordEncoder.of(tokenizer, {**form, **changes}, np.dtype(np.int32), True) is not None

    assert known()
    assert not known(normalizer={"type": "NFKC"})
    assert not known(model={**form["model"], "dropout": 0.1})
    assert not known(model={**form["model"], "type": "Unigram"})
    assert not known(pre_tokenizer=None)
    assert not known(pre_tokenizer={**level, "add_prefix_space": True, "use_regex": True})
    assert not known(pre_tokenizer={"type": "Sequence", "pretokenizers": [level]})
    for change in (
        {"behavior": "Removed"},
        {"invert": True},
        {"pattern": {"Regex": r"\s+"}},
        {"pattern": {"String": " "}},
    ):
        split = {**form["pre_tokenizer"]["pretokenizers"][0], **change}
        assert not known(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]}), change
    for change in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"content": "a b"}, {"content": "é"}):
        token = {**form["added_tokens"][-1], **change}
        assert not known(added_tokens=[token]), change
        assert known(added_tokens=[{**token, "special": True}])

"""Shards become pieces and pieces one pair, whatever the number of pieces; every document is found again by its id."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.clean.removals import Removal
from megatron_octo.data.index.encode import Encoder, load_encoder
from megatron_octo.data.index.join import join_pieces
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.index.table import DocumentTable, docs_path, pair_files, read_histogram
from megatron_octo.data.index.tokenise import without, write_piece
from megatron_octo.data.index.train_tokenizer import train_tokenizer
from megatron_octo.errors import DataError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    texts = ["Ana has 7 books, finds 3 and loses 12. How many now?"]
    return load_encoder(train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer")), IndexConfig())


def _documents(count: int, seed: int = 0) -> list[Document]:
    chance = random.Random(seed)
    words = ["Ana", "has", "books", "finds", "loses", "How", "many", "now", "7", "31", "⊕", "é"]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 40))) for _ in range(count)]
    return [Document(text, f"web/{'ab'[2 * n // count]}.jsonl:{3 * n + 1}") for n, text in enumerate(texts)]


def _pieces(folder: Path, encoder: Encoder, documents: list[Document], cuts: list[int]) -> list[Path]:
    prefixes = []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, len(documents)], strict=True)):
        prefixes.append(folder / f"piece-{number}")
        write_piece(documents[first:last], prefixes[-1], encoder, {})
    return prefixes


@pytest.mark.parametrize("cuts", [[], [30], [1, 30, 30, 55]])
@pytest.mark.parametrize("budget", [None, 1, 400])
def test_the_joined_pair_does_not_depend_on_the_pieces(
    tmp_path: Path, encoder: Encoder, cuts: list[int], budget: int | None
) -> None:
    documents = _documents(60)
    tokens = list(encoder.documents([document.text for document in documents]))
    kept = 60 if budget is None else 1 + int(np.searchsorted(np.cumsum([len(each) for each in tokens]), budget))
    facts = join_pieces(_pieces(tmp_path, encoder, documents, cuts), tmp_path / "web", budget)

    index = read_index(tmp_path / "web")
    assert [index.document(n).tolist() for n in range(index.documents)] == tokens[:kept]
    assert facts["documents"] == kept and facts["beyond_budget"]["documents"] == 60 - kept
    assert facts["tokens"] + facts["beyond_budget"]["tokens"] == sum(map(len, tokens))
    assert np.array_equal(read_histogram(tmp_path / "web"), np.bincount(index.all_tokens(), minlength=encoder.rows))
    table = DocumentTable(docs_path(tmp_path / "web"))
    assert [table.id_of(n) for n in range(table.documents)] == [document.id for document in documents[:kept]]
    assert [table.find(document.id) for document in documents] == [*range(kept), *[None] * (60 - kept)]
    alone = join_pieces(_pieces(tmp_path / "alone", encoder, documents, []), tmp_path / "alone" / "web", budget)
    assert alone["sha256"] == facts["sha256"] and alone["unigram_entropy"] == facts["unigram_entropy"]
    assert not list(tmp_path.glob(".*"))


def test_a_budget_that_is_not_reached_and_a_corpus_without_documents_are_refused(
    tmp_path: Path, encoder: Encoder
) -> None:
    pieces = _pieces(tmp_path, encoder, _documents(5), [2])
    with pytest.raises(DataError, match="web.tokens = 5000, but its files have only"):
        join_pieces(pieces, tmp_path / "web", 5000)
    assert not [path for path in pair_files(tmp_path / "web") if path.exists()]
    write_piece([], tmp_path / "none", encoder, {})
    with pytest.raises(DataError, match="web holds no documents"):
        join_pieces([tmp_path / "none"], tmp_path / "web")


def test_a_piece_that_was_altered_is_not_joined(tmp_path: Path, encoder: Encoder) -> None:
    facts = write_piece(_documents(9), tmp_path / "piece", encoder, {})
    path = tmp_path / "piece.bin"
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"piece\.bin is damaged: its hash"):
        join_pieces([tmp_path / "piece"], tmp_path / "web", hashes=[facts["blake3"]])
    assert not [path for path in pair_files(tmp_path / "web") if path.exists()]
    join_pieces([tmp_path / "piece"], tmp_path / "web")


def test_a_small_budget_is_not_read_far_beyond(tmp_path: Path, encoder: Encoder) -> None:
    """Of an endless source, such as generated text."""
    read, endless = itertools.count(), _documents(40)
    documents = (endless[next(read) % 40] for _ in itertools.repeat(None))
    facts = write_piece(documents, tmp_path / "piece", encoder, {}, limit=20_000)
    assert 20_000 <= facts["tokens"] < 26_000 and next(read) == facts["documents"]


def test_what_was_removed_is_left_out_and_counted() -> None:
    counted: dict[str, int] = {}
    removals = [Removal(place, reason, "", "", "") for place, reason in ((1, "leak"), (3, "leak"), (4, "heldout"))]
    documents = _documents(6)
    assert list(without(documents, removals, counted)) == [documents[0], documents[2], documents[5]]
    assert counted == {"leak": 2, "heldout": 1}
    with pytest.raises(AssertionError, match="comes after a later place: it would stay"):
        list(without(documents, [removals[1], removals[0]], {}))


def test_a_shuffled_file_is_searched_too(tmp_path: Path, encoder: Encoder) -> None:
    documents = _documents(40)
    random.Random(1).shuffle(documents)
    write_piece(documents, tmp_path / "piece", encoder, {})
    table = DocumentTable(docs_path(tmp_path / "piece"))
    assert [table.find(document.id) for document in documents] == list(range(40))
    for name in ("web/a.jsonl:2", "web/c.jsonl:1", "web/a.jsonl", "web/a.jsonl:-1", f"web/a.jsonl:{2**32 + 1}"):
        assert table.find(name) is None
    with pytest.raises(IndexError):
        table.id_of(40)

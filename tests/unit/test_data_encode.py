"""The rules of marks hold for every kind of tokenizer, whatever its own files would add or read into a text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.index import encode
from megatron_octo.data.index.encode import Encoder, load_encoder, open_encoder, vocabulary_of
from megatron_octo.data.index.pairs import token_dtype
from megatron_octo.data.index.tokenise import write_piece
from megatron_octo.data.index.train_tokenizer import train_tokenizer
from megatron_octo.errors import ConfigError, DataError

TEXTS = ["Ana has 7 books.", "She finds 3 <s> more </s> and says <|end_of_text|>."]
CONTROL = IndexConfig(special_tokens="control")


def _hugging_face(folder: Path, table: bool = True) -> Path:
    """A byte-level tokenizer whose post-processor puts marks around every text; with a known cut or another."""
    train_tokenizer(TEXTS, 300, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if not table:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    begin, end = ((mark, tokenizer.token_to_id(mark)) for mark in ("<|begin_of_text|>", "<|end_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _another_cut(folder: Path) -> Path:
    return _hugging_face(folder, table=False)


def _sentence_piece(folder: Path) -> Path:
    from sentencepiece import SentencePieceTrainer

    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", hard_vocab_limit=False, remove_extra_whitespaces=False,
        control_symbols=["<|end_of_text|>"], user_defined_symbols=["<tool>"], minloglevel=2,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=[_hugging_face, _another_cut, _sentence_piece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("tokenizer") / "files")


def _tokens(encoder: Encoder, text: str) -> list[int]:
    return next(encoder.documents([text]))


def _marks(encoder: Encoder) -> tuple[str, int]:
    mark = "<|end_of_text|>"
    return mark, next(t for t in range(encoder.rows) if encoder.decode([t]) == mark)


def test_one_end_mark_and_none_of_the_tokenizers_own(tokenizer: Path) -> None:
    encoder = open_encoder(tokenizer, IndexConfig())
    tokens = _tokens(encoder, TEXTS[0])
    assert encoder.end is not None and tokens.count(encoder.end) == 1 and tokens[-1] == encoder.end
    assert encoder.begin is None and encoder.decode(tokens[:-1]).strip() == TEXTS[0]
    assert encoder.added_by_itself == (
        ["<|begin_of_text|>", "<|end_of_text|>"] if tokenizer.name and encoder.path.suffix == ".json" else []
    )


def test_marks_in_texts_stay_text_unless_asked(tokenizer: Path) -> None:
    text, meant = open_encoder(tokenizer, IndexConfig()), open_encoder(tokenizer, CONTROL)
    mark, number = _marks(text)
    assert number not in _tokens(text, TEXTS[1])[:-1]
    assert text.decode(_tokens(text, TEXTS[1])[:-1]).strip() == TEXTS[1]
    assert _tokens(meant, TEXTS[1])[:-1].count(number) == 1
    assert _tokens(meant, mark * 2)[:2] == [number] * 2


def test_begin_marks_and_other_end_marks_are_a_matter_of_the_rules(tokenizer: Path) -> None:
    plain = _tokens(open_encoder(tokenizer, IndexConfig(eos="none")), "a b")
    both = open_encoder(tokenizer, IndexConfig(bos="before_document"))
    assert both.begin is not None and _tokens(both, "a b") == [both.begin, *plain, both.end]
    named = open_encoder(tokenizer, IndexConfig(eos_token="<|end_of_text|>"))
    assert named.end == _marks(named)[1] and _tokens(named, "a b") == [*plain, named.end]
    with pytest.raises(DataError, match=r"<\|gone\|>.*index.eos_token"):
        open_encoder(tokenizer, IndexConfig(eos_token="<|gone|>"))


def test_a_text_without_tokens_is_no_document(tokenizer: Path, tmp_path: Path) -> None:
    encoder, skipped = open_encoder(tokenizer, IndexConfig()), {}
    documents = [Document(text, f"web/a:{n}") for n, text in enumerate(["", "a", ""], start=1)]
    facts = write_piece(documents, tmp_path / "piece", encoder, skipped)
    assert facts["documents"] == 1 and skipped == {"no tokens": 2}


def test_batches_do_not_change_documents(tokenizer: Path) -> None:
    encoder = open_encoder(tokenizer, IndexConfig())
    found = encoder.encode([*TEXTS, "", "π"])
    assert found.lengths == [len(_tokens(encoder, text)) if text else 0 for text in [*TEXTS, "", "π"]]
    tokens = np.frombuffer(found.content, encoder.dtype)
    assert tokens.tolist() == [t for text in [*TEXTS, "π"] for t in _tokens(encoder, text)]
    assert found.counts.tolist() == np.bincount(tokens, minlength=encoder.rows).tolist()
    assert vocabulary_of(tokenizer) == encoder.rows == encoder.vocabulary


def _unigram(folder: Path) -> Path:
    """Marks are pieces of its vocabulary: the library finds them in a text even when told not to."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("a", -1.0),
        ("▁", -1.0),
        ("s", -2.0),
        ("<", -3.0),
        ("/", -3.0),
        (">", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<unk>"), AddedToken("</s>")])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return folder


def test_a_tokenizer_that_cannot_keep_marks_as_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _unigram(tmp_path / "unigram")
    with pytest.raises(DataError, match="'</s>' written in a text becomes a control token"):
        load_encoder(folder)
    meant = open_encoder(folder, CONTROL)
    assert _tokens(meant, "a</s>")[-2:] == [1, 1] and _tokens(meant, "ab")[-2] == 0, "unknown text is no mark"
    monkeypatch.setattr(Encoder, "_refuse_marks_in_texts", lambda self, control: None)
    late = open_encoder(folder, IndexConfig())
    documents = [Document("a a", "web/a.jsonl:7"), Document("a b </s>", "web/a.jsonl:9")]
    with pytest.raises(DataError, match=r"web/a\.jsonl:9: its text became control token 1"):
        write_piece(documents, tmp_path / "piece", late, {})
    assert not list(tmp_path.glob("*piece*"))


@pytest.mark.parametrize("table", [True, False])
def test_an_end_mark_that_is_added_and_not_special_cannot_come_from_a_text(tmp_path: Path, table: bool) -> None:
    folder = _hugging_face(tmp_path / "files", table)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("</s>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder = open_encoder(folder, IndexConfig(eos_token="</s>"))
    tokens = _tokens(encoder, "a </s> b")
    assert tokens.count(encoder.end) == 1 and tokens[-1] == encoder.end
    assert encoder.decode(tokens[:-1]).strip() == "a </s> b"


def test_a_user_defined_end_mark_of_sentence_piece_cannot_be_kept_as_text(tmp_path: Path) -> None:
    folder, rules = _sentence_piece(tmp_path / "files"), {"eos_token": "<tool>"}
    with pytest.raises(DataError, match="'<tool>' written in a text becomes a control token"):
        open_encoder(folder, IndexConfig(**rules))
    meant = open_encoder(folder, IndexConfig(**rules, special_tokens="control"))
    assert _tokens(meant, "a<tool>").count(meant.end) == 2


def test_rules_that_contradict_each_other_are_refused() -> None:
    from megatron_octo.config.load import parse_config

    with pytest.raises(ConfigError, match="eos is none"):
        parse_config(IndexConfig, {"eos": "none", "eos_token": "x"}, "index.yaml")


def test_types_are_megatrons_and_wide_enough() -> None:
    megatron = [(1, "uint16"), (65_499, "uint16"), (65_500, "int32"), (128_256, "int32")]
    assert [token_dtype(entries).name for entries, _ in megatron] == [name for _, name in megatron]
    assert token_dtype(300, 65_536).name == "uint16" and token_dtype(300, 65_537).name == "int32"


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05nonsense")
    with pytest.raises(DataError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_encoder(tmp_path)
    with pytest.raises(DataError, match=r"gone\.model/tokenizer\.json does not exist"):
        load_encoder(tmp_path / "gone.model")
    folder = _unigram(tmp_path / "unigram")
    for content, reason in (("{", "cannot be read"), ("[]", "no JSON object"), ("{}", "eos_token = None")):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=reason):
            open_encoder(folder, IndexConfig())


def test_an_open_tokenizer_is_kept_while_its_files_are_the_same(tmp_path: Path) -> None:
    first = train_tokenizer(TEXTS, 300, tmp_path / "first")
    second = train_tokenizer(TEXTS, 300, tmp_path / "second")
    found = load_encoder(first)
    assert load_encoder(second) is found and load_encoder(first, CONTROL) is not found
    kept = load_encoder(first)
    train_tokenizer(["x y z " * 9], 280, first)
    assert load_encoder(first).rows != kept.rows and len(encode._kept) == 1


WORKER = """
import sys
from pathlib import Path
from datatrove.data import Document
from megatron_octo.data.index.encode import load_encoder
from megatron_octo.data.index.tokenise import write_piece
encoder = load_encoder(Path(sys.argv[1]))
write_piece([Document("Ana has 7 books.", f"web/a:{n}") for n in range(900)], Path(sys.argv[2]), encoder, {})
print([name for name in ("torch", "megatron", "transformers", "datasets", "spacy") if name in sys.modules])
print(len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").exists() else 1)
"""


def test_a_worker_imports_nothing_heavy_and_has_one_thread(tmp_path: Path) -> None:
    folder = _another_cut(tmp_path / "tokenizer")  # goes through the library, which would start threads
    environment = {name: value for name, value in os.environ.items() if "PARALLELISM" not in name}
    environment |= {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(folder), str(tmp_path / "piece")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split("\n")[:2] == ["[]", "1"]

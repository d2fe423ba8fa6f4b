"""Our files are Megatron-LM's to the byte: kept hashes of what its tool wrote, and datatrove's writer beside ours."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from datatrove.data import Document

from megatron_octo.config.index import IndexConfig
from megatron_octo.data.index.encode import load_encoder
from megatron_octo.data.index.join import join_pieces
from megatron_octo.data.index.tokenise import write_piece
from megatron_octo.files import hash_file, read_json

sys.path.insert(0, str(Path(__file__).parent))

from megatron_lm_files import CASES, HERE, TEXTS, tokenizer_of  # noqa: E402


def _write(texts: list[str], tokenizer: Path, index: IndexConfig, folder: Path) -> Path:
    """Through two pieces, joined."""
    encoder = load_encoder(tokenizer, index)
    documents = [Document(text, f"web/a.jsonl:{number}") for number, text in enumerate(texts, start=1)]
    for name, part in (("1", documents[:2]), ("2", documents[2:])):
        write_piece(part, folder / name, encoder, {})
    join_pieces([folder / "1", folder / "2"], folder / "web")
    return folder / "web"


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_megatron_lms_tool(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    texts = [json.loads(line)["text"] for line in (HERE / case["texts"]).read_text(encoding="utf-8").splitlines()]
    index = IndexConfig(special_tokens=case.get("special_tokens", "text"))
    prefix = _write(texts, tokenizer_of(case, tmp_path), index, tmp_path)
    written = {suffix: hash_file(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")}
    assert written == read_json(HERE / "hashes.json")[name]


def test_files_are_those_of_datatroves_writer(tmp_path: Path) -> None:
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    chance = random.Random(3)
    texts = ["\n".join(chance.choices([text for text in TEXTS if text.strip()], k=3))[: 40 * n] for n in range(1, 60)]
    tokenizer = HERE / "tokenizer"
    writer = MegatronDocumentTokenizer(str(tmp_path), None, str(tokenizer / "tokenizer.json"), "<|end_of_text|>")
    writer.run(iter([Document(text, "") for text in texts]), 0, 1)
    prefix = _write(texts, tokenizer, IndexConfig(), tmp_path)
    for suffix in ("bin", "idx"):
        assert Path(f"{prefix}.{suffix}").read_bytes() == (tmp_path / f"00000_tokens.{suffix}").read_bytes()

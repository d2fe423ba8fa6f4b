"""What Megatron-LM's own tools/preprocess_data.py writes for a few small texts, as hashes.

`python tests/golden/megatron_lm_files.py CHECKOUT` makes `megatron_lm/` anew with a checkout of Megatron-LM; what is
kept there was made with core_v0.16.1: tokenizers and texts are this project's, the hashes follow from its tool.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "megatron_lm"
CASES: dict[str, dict[str, Any]] = {
    "plain": {"texts": "texts.jsonl"},
    "marks are control tokens": {"texts": "marks.jsonl", "special_tokens": "control"},
    "four bytes a token": {"texts": "texts.jsonl", "entries": 65_500},
    "the last vocabulary of two bytes": {"texts": "texts.jsonl", "entries": 65_499},
    "SentencePiece": {"texts": "texts.jsonl", "model": True},
}
"""Texts of each case, the rule for marks, entries to fill the tokenizer up to, and whether it is a `.model` file."""

TEXTS = [
    "What is 12 + 35? We add: 12 + 35 = 47.\n\\boxed{47}",
    "Let $f(x) = \\frac{x^2 - 1}{x + 1}$ for x ≠ -1.  Then f(x) = x − 1, isn't it?\n\n\tYes: (x-1)(x+1) = x² - 1.",
    " leading and trailing spaces \n",
    "Größe, naïve café, Ελληνικά, 数学 and 🙂 astral signs; 1234567 and 3.14159",
    "a",
    "One line.\r\nAnother line.\r\n\r\n   Indented by three.",
    "the rain in Spain " * 40,
]
MARKS = ["Before <|end_of_text|> and after it.", "<|begin_of_text|>Twice<|end_of_text|><|end_of_text|>", *TEXTS[:2]]


def tokenizer_of(case: dict[str, Any], folder: Path) -> Path:
    """The tokenizer of a case: the kept one, or the kept one filled up with added tokens, in `folder`."""
    if case.get("model"):
        return HERE / "sentencepiece.model"
    if "entries" not in case:
        return HERE / "tokenizer"
    form = json.loads((HERE / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    kept = {**form["added_tokens"][0], "special": True}
    first = len(form["model"]["vocab"])
    form["added_tokens"] += [{**kept, "id": n, "content": f"<|{n}|>"} for n in range(first, case["entries"])]
    (folder / "tokenizer.json").write_text(json.dumps(form), encoding="utf-8")
    settings = (HERE / "tokenizer" / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").write_bytes(settings)
    return folder


def make(checkout: Path) -> None:
    """Write texts, tokenizers, and the hashes of what the tool of a checkout makes of them."""
    from sentencepiece import SentencePieceTrainer

    from megatron_octo.data.index.train_tokenizer import train_tokenizer
    from megatron_octo.files import hash_file, write_json

    HERE.mkdir(exist_ok=True)
    for name, texts in (("texts", TEXTS), ("marks", MARKS)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(TEXTS, 320, HERE / "tokenizer")
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(HERE / "sentencepiece"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (HERE / "sentencepiece.vocab").unlink()
    tool = _bench()
    hashes = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = tokenizer_of(case, Path(folder))
            options = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer)]
            made = Path(folder) / "out"
            _, prefix = tool.megatron_lm(
                checkout, HERE / case["texts"], tokenizer, made, *(options if case.get("model") else [])
            )
            hashes[name] = {suffix: hash_file(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")}
    write_json(HERE / "hashes.json", hashes)


def _bench() -> Any:
    path = Path(__file__).resolve().parents[2] / "tools" / "bench_data.py"
    spec = importlib.util.spec_from_file_location("bench_data", path)
    assert spec and spec.loader
    module = sys.modules["bench_data"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())

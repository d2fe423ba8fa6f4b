"""The transformers engine on a random tiny Llama: greedy equals `generate` one prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.errors import DataError
from megatron_octo.evaluate.generate import TransformersEngine
from megatron_octo.evaluate.run import evaluate_models

END = "<|end_of_text|>"
PROMPTS = ["Question: a\nAnswer:", "Question: what is 1+1?\nAnswer:", "Q", "Question: b\nAnswer:"]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over bytes, large initial weights so that its outputs are varied."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token="<|begin_of_text|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.6, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine(model_directory: Path) -> TransformersEngine:
    return TransformersEngine(model_directory, device="cpu", batch_size=3)


def one_by_one(engine: TransformersEngine, text: str, length: int, end: int) -> list[int]:
    """The oracle: the library, one unpadded prompt, no stopping; cut at the end token."""
    import torch

    ids = torch.tensor([engine.encode(text)])
    with torch.inference_mode():
        for _ in range(length):
            logits = engine.model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    row = ids[0, -length:].tolist()
    return row[: row.index(end)] if end in row else row


def test_greedy_equals_one_prompt_at_a_time(engine: TransformersEngine) -> None:
    free = one_by_one(engine, PROMPTS[1], 20, end=-1)
    ends, engine.ends = engine.ends, [free[6]]  # a token that really comes up, so that some row stops early
    try:
        answers = engine.generate([engine.encode(text) for text in PROMPTS], 20, 0.0, seed=0)
        expected = [one_by_one(engine, text, 20, free[6]) for text in PROMPTS]
    finally:
        engine.ends = ends
    assert [list(answer.token_ids) for answer in answers] == expected
    assert [answer.stopped for answer in answers] == [len(row) < 20 for row in expected]
    assert answers[1].stopped and answers[1].text == engine.tokenizer.decode(expected[1])


def test_sampling_is_a_function_of_the_seed(engine: TransformersEngine) -> None:
    import torch

    prompts = [engine.encode(text) for text in PROMPTS]
    state = torch.random.get_rng_state()
    first, again, other = (engine.generate(prompts, 12, 1.0, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are left alone"


def test_stop_strings_cut_the_text(model_directory: Path, engine: TransformersEngine) -> None:
    prompt = engine.encode(PROMPTS[1])
    text = engine.generate([prompt], 20, 0.0, 0)[0].text
    stop = next(text[i : i + 2] for i in range(4, 16) if text[i : i + 2].isascii())
    answer = TransformersEngine(model_directory, device="cpu", stop=[stop]).generate([prompt], 20, 0.0, 0)[0]
    assert answer.stopped and answer.text == text[: text.index(stop)] and len(answer.token_ids) < 20


def test_an_authors_generation_settings_change_nothing(
    model_directory: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "generation_config.json"
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_length": 60, "top_k": 1, "do_sample": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}), encoding="utf-8")
    bent = TransformersEngine(tmp_path, device="cpu", batch_size=3)
    prompts = [engine.encode(text) for text in PROMPTS]
    for temperature in (0.0, 1.0):
        assert bent.generate(prompts, 20, temperature, 0) == engine.generate(prompts, 20, temperature, 0)


def test_prompts_that_do_not_fit_are_refused(engine: TransformersEngine) -> None:
    with pytest.raises(DataError, match="exceed the context 128"):
        engine.generate([[1] * 100], 29, 0.0, 0)
    with pytest.raises(DataError, match="no tokens"):
        engine.generate([[]], 5, 0.0, 0)


def test_a_damaged_model_is_a_data_error(model_directory: Path, tmp_path: Path) -> None:
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match="cannot be loaded"):
        TransformersEngine(tmp_path, device="cpu")


def test_evaluation_of_a_real_model(model_directory: Path, tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text(
        "".join(f'{{"id": "{n}", "question": "what is {n}?", "answer": "{n}"}}\n' for n in range(3)), encoding="utf-8"
    )
    config = EvaluateConfig(
        models={"m": model_directory}, problems=problems, max_new_tokens=8, samples=2, device="cpu", threads=1,
        bos=True, out=tmp_path / "out",
    )  # fmt: skip
    result = evaluate_models(config)["m"]
    assert result["greedy"]["n_problems"] == 3 and result["sampled"]["verdicts"]["correct"] == 0
    assert result["greedy"]["mean_response_tokens"] <= 8 and result["versions"]["transformers"]

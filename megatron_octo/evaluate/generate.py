"""Generation engines: token ids in, responses out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_octo.errors import DataError, EnvironmentProblem

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Generation:
    """One response.

    Args:
        token_ids: generated tokens, without the prompt and without the end-of-text token.
        text: their text, special tokens spelled out, cut before a stop string.
        stopped: whether the response ended by itself: end-of-text or a stop string, not the length limit.
    """

    token_ids: tuple[int, ...]
    text: str
    stopped: bool


class Engine(Protocol):
    """What evaluation needs of a model; a vLLM engine would fit here too."""

    context: int
    """Longest prompt plus response, in tokens."""
    bos: str | None
    """Text of the begin-of-text token, if the tokenizer has one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; no special tokens are added."""
        ...

    def generate(
        self,
        prompts_token_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Generation]:
        """Answer prompts, in order; temperature 0 is greedy. `done` is told of responses as they are finished."""
        ...


class TransformersEngine:
    """Generation with `transformers`, batched by prompt length. fp32 on a CPU, bf16 on a GPU.

    A decode loop of our own over the same forward pass, all rows kept to the end, was no faster than the library's
    `generate` on a model of under a million parameters. One that drops finished rows has not been measured.

    Args:
        directory: Hugging Face model directory with safetensors weights and a tokenizer.
        device: "auto" takes a GPU when there is one.
        batch_size: prompts per batch.
        stop: strings that end a response besides the end-of-text token.

    Raises:
        DataError: the directory is missing or incomplete, holds only pickled weights, or wants code of its own.
        EnvironmentProblem: a GPU was asked for and there is none.
    """

    def __init__(
        self, directory: Path, *, device: Device = "auto", batch_size: int = 128, stop: Sequence[str] = ()
    ) -> None:
        import torch

        check_model_directory(directory)
        if device == "cuda" and not torch.cuda.is_available():
            raise EnvironmentProblem("device = 'cuda': this machine shows no GPU", fix="use device=auto")
        name = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        self.batch_size, self.stop = batch_size, tuple(stop)
        self.model, self.tokenizer = _load(directory, self.device)
        self.context = int(self.model.config.max_position_embeddings)
        self.bos = self.tokenizer.bos_token
        self.ends = _end_tokens(self.model, self.tokenizer, directory)
        self.model.generation_config = _nothing_asked()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; no special tokens are added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def generate(
        self,
        prompts_token_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Generation]:
        """Answer prompts; see `Engine`. Samples depend on the seed, the prompts and the batch size, on nothing else.

        Raises:
            DataError: an empty prompt, or one that leaves no room for its response.
        """
        import torch

        self._check_lengths(prompts_token_ids, max_new_tokens)
        order = sorted(range(len(prompts_token_ids)), key=lambda index: len(prompts_token_ids[index]))
        answers: dict[int, Generation] = {}
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = self._batch([prompts_token_ids[index] for index in chosen], max_new_tokens, temperature)
                answers.update(zip(chosen, batch, strict=True))
                done(len(chosen))
        return [answers[index] for index in range(len(order))]

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest = max((len(prompt) for prompt in prompts), default=1)
        if any(not prompt for prompt in prompts):
            raise DataError("a prompt has no tokens", "the model has nothing to go on from", "check the template")
        if longest + max_new_tokens > self.context:
            raise DataError(
                f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} exceed the context {self.context}",
                "positions beyond it are undefined",
                f"use max_new_tokens <= {self.context - longest}, or leave the problem out",
            )

    def _batch(self, prompts: list[Sequence[int]], max_new_tokens: int, temperature: float) -> list[Generation]:
        import torch

        width = max(len(prompt) for prompt in prompts)
        # Padding stands on the left and is masked, so its value never matters.
        ids = torch.tensor([[self.ends[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        output = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=self._settings(max_new_tokens, sampling if temperature > 0 else {"do_sample": False}),
            **({"stop_strings": list(self.stop), "tokenizer": self.tokenizer} if self.stop else {}),
        )
        return [self._finish(row) for row in output[:, width:].tolist()]

    def _settings(self, max_new_tokens: int, sampling: dict[str, Any]) -> Any:
        settings = _nothing_asked()
        settings.update(max_new_tokens=max_new_tokens, eos_token_id=self.ends, pad_token_id=self.ends[0], **sampling)
        return settings

    def _finish(self, row: list[int]) -> Generation:
        """Cut a row of the output at its end token; rows that ended early are padded with it."""
        end = next((position for position, token in enumerate(row) if token in self.ends), None)
        ids = row[:end]
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cuts = [text.index(stop) for stop in self.stop if stop in text]
        if cuts:
            text = text[: min(cuts)]
        return Generation(tuple(ids), text, end is not None or bool(cuts))


def check_model_directory(directory: Path) -> None:
    """Refuse a directory that is no complete model, or not a safe one to load.

    Raises:
        DataError: what is missing or unsafe.
    """
    if not (directory / "config.json").is_file():
        raise DataError(
            f"{directory}: no config.json", "a model is a Hugging Face directory", "convert it: octo convert to-hf"
        )
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        rule = "pickled weights can run code when loaded" if pickled else "there is nothing to load"
        raise DataError(f"{directory}: no safetensors weights", rule, "save the model as safetensors")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise DataError(f"{directory}: no tokenizer", "prompts cannot be read", "copy the tokenizer's files there")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _json_object(directory / name):
            raise DataError(f"{directory / name}: names code of its own (auto_map)", "model directories run no code")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {type(value).__name__}", "an object is expected")
    return value


def _load(directory: Path, device: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), **safe)
        model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, use_safetensors=True, **safe)
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise DataError(f"{directory}: cannot be loaded ({message})", fix="check the model directory") from error
    return model.to(device).eval(), tokenizer


def _nothing_asked() -> Any:
    """A generation config that asks for nothing.

    The model's own must be one too: transformers fills whatever a call leaves open from it, and so a repetition
    penalty or a shortest length that the model's author put beside the weights would bend every score.
    """
    from transformers import GenerationConfig

    return GenerationConfig()


def _end_tokens(model: Any, tokenizer: Any, directory: Path) -> list[int]:
    """Ids that end a response: the model's generation config, else its config, else the tokenizer."""
    for found in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return list(found) if isinstance(found, (list, tuple)) else [int(found)]
    raise DataError(f"{directory}: no end-of-text token", "a response could never stop", "set eos_token_id")

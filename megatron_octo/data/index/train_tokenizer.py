"""A byte-level BPE tokenizer trained on given texts, saved as a Hugging Face directory."""

from collections.abc import Iterable
from pathlib import Path

from megatron_octo.errors import ConfigError
from megatron_octo.files import read_json, write_json

PAD = "<|pad|>"
BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
SPECIAL_TOKENS = (PAD, BEGIN_OF_TEXT, END_OF_TEXT)

_BYTES = 256
_MODEL_MAX_LENGTH = 131072


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, out: Path) -> Path:
    """Trains byte-level BPE and writes it where ``AutoTokenizer`` can load it.

    Digits are split off from everything else and grouped by at most three, as Llama 3 does, so a number of up to
    three digits is one token wherever the texts show it often enough. Any text survives encoding and decoding
    unchanged. Encoding adds no special tokens: the end-of-text mark is the business of whoever makes documents.

    Args:
        texts: Training texts, read once.
        vocabulary_size: Upper bound on the entries, special tokens and all 256 bytes included.
        out: Directory to create or to overwrite.

    Returns:
        ``out``, now holding ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        ConfigError: The vocabulary cannot hold the special tokens and all bytes.
    """
    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocabulary_size < smallest:
        raise ConfigError(
            f"tokenizer.train.vocabulary_size = {vocabulary_size}",
            f"{smallest} entries are taken by the 256 bytes and the special tokens",
            f"set it to at least {smallest}",
        )
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=_MODEL_MAX_LENGTH,
    ).save_pretrained(str(out))
    settings = out / "tokenizer_config.json"
    # transformers 5 writes its own new name of this class, which transformers 4 does not know; both know this one.
    write_json(settings, {**read_json(settings), "tokenizer_class": "PreTrainedTokenizerFast"})
    return out

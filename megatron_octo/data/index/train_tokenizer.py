"""A byte-level BPE tokenizer trained on given texts, saved as a Hugging Face directory."""

from collections.abc import Iterable
from pathlib import Path

from megatron_octo.errors import ConfigError
from megatron_octo.files import write_json

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
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # What transformers would save, without the seconds it takes to import it; versions 4 and 5 know this class.
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "backend": "tokenizers",
        "bos_token": BEGIN_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": _MODEL_MAX_LENGTH,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", settings)
    return out

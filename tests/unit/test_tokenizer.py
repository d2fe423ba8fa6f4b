"""The trained tokenizer: loses nothing, keeps numbers whole, and leaves document ends to others."""

import pytest

from megatron_octo.data.index.train_tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, PAD, train_tokenizer
from megatron_octo.data.world import KINDS, QUESTION_TEMPLATE, World, WorldConfig
from megatron_octo.errors import ConfigError

SIZE = 512


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    texts = (text for kind in KINDS for text in World().documents(kind, 500, "tokenizer"))
    return train_tokenizer(texts, SIZE, tmp_path_factory.mktemp("tokenizer") / "hf")


@pytest.fixture(scope="module")
def tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


def test_the_directory_is_what_hugging_face_loads(directory, tokenizer):
    assert {p.name for p in directory.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    assert len(tokenizer) <= SIZE
    assert tokenizer.model_max_length < 10**9
    assert tokenizer.clean_up_tokenization_spaces is False


def test_special_tokens_have_the_first_ids(tokenizer):
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BEGIN_OF_TEXT, END_OF_TEXT)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer(END_OF_TEXT)["input_ids"] == [2]


def test_encoding_adds_no_token(tokenizer):
    assert not {0, 1, 2} & set(tokenizer("Ana has 7 pens.")["input_ids"])


@pytest.mark.parametrize(
    "text",
    [
        "Ana has 7 pens , buys 5 ?  Two  spaces .",
        "  leading, trailing \n\n\t and tabs\r\n",
        "na\u00efve \u221a2 \u2264 \u03c0, \u4e09\u5341 \u0664\u0662 \U0001f44d\u200d",
        r"\[ \frac{1}{2} = 0.5 \] and 1234567.891",
        "do n't , we 're",
    ],
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_number_is_the_same_single_token_everywhere(tokenizer):
    for number in range(WorldConfig().highest_number + 1):
        (token,) = tokenizer(str(number))["input_ids"]
        for text in (f"Ana has {number} pens", f"{number}+1=2", f"3-1={number}.", rf"So \boxed{{{number}}}."):
            assert token in tokenizer(text)["input_ids"], text


def test_long_numbers_are_cut_into_groups_of_three(tmp_path):
    from transformers import AutoTokenizer

    directory = train_tokenizer(["1234567 " * 50], 600, tmp_path)
    assert AutoTokenizer.from_pretrained(str(directory)).tokenize("1234567") == ["123", "456", "7"]


def test_all_prompts_have_one_length(tokenizer):
    prompts = [QUESTION_TEMPLATE.format(question=p.question) for p in World().problems("train", 300)]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in prompts}) == 1


def test_a_prompt_is_a_prefix_of_its_document(tokenizer):
    for text in World().documents("short_cot", 50):
        prompt = text[: text.index("Answer:") + len("Answer:")]
        ids = tokenizer(prompt)["input_ids"]
        assert tokenizer(text)["input_ids"][: len(ids)] == ids


def test_training_is_repeatable(directory, tmp_path):
    texts = (text for kind in KINDS for text in World().documents(kind, 500, "tokenizer"))
    again = train_tokenizer(texts, SIZE, tmp_path)
    assert (again / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="259"):
        train_tokenizer(["text"], 258, tmp_path)

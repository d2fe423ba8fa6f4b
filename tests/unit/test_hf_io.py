"""What surrounds the weights of a Hugging Face directory: carried, made to agree, never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import hf_io
from megatron_octo.convert.hf_io import TokenizerFacts
from megatron_octo.data.index.train_tokenizer import train_tokenizer
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.locations import locate

MODEL = ModelConfig(layers=2, hidden=16, heads=4, kv_groups=2, ffn=24, vocabulary=400, tied_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(["one two three " * 20], 300, tmp_path_factory.mktemp("tokenizer") / "hf")


@pytest.fixture
def model_dir(tmp_path: Path, tokenizer: Path) -> Path:
    directory = tmp_path / "model"
    hf_io.copy_assets(tokenizer, directory)
    return directory


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **values}))


def _written(directory: Path, facts: TokenizerFacts, **generation: Any) -> tuple[dict, dict]:
    if generation:
        (directory / hf_io.GENERATION_FILE).write_text(json.dumps(generation))
    hf_io.write_configuration(directory, MODEL, "bfloat16", facts)
    return tuple(json.loads((directory / name).read_text()) for name in (hf_io.CONFIG_FILE, hf_io.GENERATION_FILE))


def test_a_tokenizer_is_loaded_from_a_path_and_a_url(model_dir: Path, tmp_path: Path) -> None:
    facts = hf_io.tokenizer_facts(model_dir)
    assert facts == TokenizerFacts(size=facts.size, bos=1, eos=2, pad=0)
    assert 256 < facts.size <= 300
    remote = locate(f"memory:/{tmp_path}/tokenizer")
    for path in model_dir.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    assert hf_io.tokenizer_facts(remote) == facts


def test_a_tokenizer_that_cannot_serve_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        hf_io.tokenizer_facts(tmp_path)
    _change(model_dir / "tokenizer_config.json", eos_token=None)
    with pytest.raises(DataError, match="no end-of-text token"):
        hf_io.tokenizer_facts(model_dir)
    (model_dir / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match=f"{model_dir}: the tokenizer cannot be loaded"):
        hf_io.tokenizer_facts(model_dir)


def test_code_is_neither_run_nor_carried(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (model_dir / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    hf_io.copy_assets(model_dir, tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*.py"))
    assert not (tmp_path / "copy" / "config.json").exists()
    _change(model_dir / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    for act in (lambda: hf_io.tokenizer_facts(model_dir), lambda: hf_io.copy_assets(model_dir, tmp_path / "other")):
        with pytest.raises(DataError, match=r"tokenizer_config.json: names code of its own \(auto_map\)"):
            act()
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "ran").exists()


def test_what_travels_is_copied_as_it_is(model_dir: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}\r\n"
    papers = {"chat_template.jinja": template, "LICENSE": "terms", "USE_POLICY.md": "policy", "NOTICE": "by us"}
    for name, text in papers.items():
        (model_dir / name).write_text(text, newline="")
    _change(model_dir / hf_io.GENERATION_FILE, temperature=0.6, eos_token_id=[2, 5])
    (model_dir / "README.md").write_text("not ours to carry")
    before = {path.name: path.read_bytes() for path in model_dir.iterdir() if path.name != "README.md"}
    hf_io.copy_assets(model_dir, tmp_path / "checkpoint" / "hugging_face")
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint/hugging_face").iterdir()} == before
    remote = locate(f"memory:/{tmp_path}/assets")
    (remote / "LICENSE").write_bytes(b"terms")
    hf_io.copy_assets(remote, tmp_path / "fetched")
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["LICENSE"]
    hf_io.copy_assets(tmp_path, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    hf_io.copy_assets(model_dir, tmp_path / "tokens", hf_io.TOKENIZER_FILES)
    assert not (tmp_path / "tokens" / "LICENSE").exists()


@pytest.mark.parametrize(
    ("carried", "stops"),
    [
        (None, 2),
        (2, 2),
        ([2], 2),
        ([7, 2, 9], [7, 2, 9]),
        (9, 2),
        ([7, 9], 2),
    ],
)
def test_the_end_of_text_is_one_in_all_places(model_dir: Path, carried: Any, stops: Any) -> None:
    facts = hf_io.tokenizer_facts(model_dir)
    config, generation = _written(model_dir, facts, eos_token_id=carried)
    assert config["eos_token_id"] == generation["eos_token_id"] == stops
    stated = hf_io.end_of_text(model_dir)
    assert stated == {"tokenizer": 2, "config": stops, "generation_config": stops, "agree": True}


@pytest.mark.parametrize(
    ("config", "generation", "agree"),
    [(2, 2, True), ([2, 5], [2, 5], True), (2, [2], False), ([2, 5], [5, 2], False), (5, 5, False), (None, None, False),
     (2, None, False), ([2, 5], 2, False)],
)  # fmt: skip
def test_a_difference_in_the_end_of_text_is_seen(model_dir: Path, config: Any, generation: Any, agree: bool) -> None:
    _change(model_dir / hf_io.CONFIG_FILE, eos_token_id=config)
    _change(model_dir / hf_io.GENERATION_FILE, eos_token_id=generation)
    assert hf_io.end_of_text(model_dir)["agree"] is agree


def test_other_generation_settings_are_kept(tmp_path: Path) -> None:
    facts = TokenizerFacts(size=300, bos=None, eos=2, pad=None)
    config, generation = _written(
        tmp_path, facts, bos_token_id=11, pad_token_id=12, temperature=0.7, top_p=0.8, _from_model_config=True
    )
    assert generation == {
        "bos_token_id": 11, "pad_token_id": 12, "eos_token_id": 2, "temperature": 0.7, "top_p": 0.8,
        "_from_model_config": True,
    }  # fmt: skip
    assert (config["bos_token_id"], config["pad_token_id"], config["dtype"]) == (11, 12, "bfloat16")
    config, generation = _written(tmp_path, TokenizerFacts(300, bos=1, eos=2, pad=0))
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (1, 0)
    (tmp_path / hf_io.GENERATION_FILE).unlink()
    config, generation = _written(tmp_path, facts)
    assert generation == {"eos_token_id": 2}


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], True, 2.0])
def test_an_end_of_text_that_is_no_id_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id = "):
        _written(tmp_path, TokenizerFacts(300, None, 2, None), eos_token_id=value)
    assert not (tmp_path / hf_io.CONFIG_FILE).exists()


def test_a_model_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    _written(tmp_path, TokenizerFacts(300, 1, 2, 0))
    assert hf_io.read_model(tmp_path) == MODEL
    with pytest.raises(DataError, match="no such directory"):
        hf_io.read_model(tmp_path / "nowhere")
    (tmp_path / hf_io.CONFIG_FILE).write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="mamba"):
        hf_io.read_model(tmp_path)


def test_files_are_compared_by_what_they_say(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory, indent in ((one, None), (two, 2)):
        directory.mkdir()
        (directory / "a.json").write_text(json.dumps({"x": 1, "y": [2]}, indent=indent))
        (directory / "b.json").write_text(json.dumps({"x": indent}))
        (directory / "c.txt").write_text(f"{indent}")
    (one / "d.json").write_text("{}")
    assert hf_io.different_files(one, two, ["a.json", "b.json", "c.txt", "d.json", "e"]) == [
        "b.json",
        "c.txt",
        "d.json",
    ]


def test_stop_tokens_that_only_the_configuration_states_travel(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": [2, 7]}')
    hf_io.take_along(tmp_path / "model", tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}


def test_a_checkpoint_is_told_from_a_model(tmp_path):
    (tmp_path / "seal.json").write_text("{}")
    with pytest.raises(DataError, match="a checkpoint or a run"):
        hf_io.read_model(tmp_path)

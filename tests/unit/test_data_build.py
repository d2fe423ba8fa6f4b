"""The whole build: deterministic, resumable after any kill, and honest in its manifest."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import dump_config, load_config, parse_config
from megatron_octo.data.engine.build import build_data, only_writer
from megatron_octo.data.engine.manifest import verify_data
from megatron_octo.data.index.digest import token_rules
from megatron_octo.data.index.encode import load_encoder
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.index.writer import IndexedWriter
from megatron_octo.data.mix.made_with import check_one_tokenizer
from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem
from megatron_octo.files import LOCK

BUDGETS = {"web": 3000, "short_cot": 2000, "long_cot": 2000, "instruction": 1000}


def _config(tmp_path: Path, **changes: object) -> DataBuildConfig:
    """A small build that has everything: the world, a corpus with GSM8K's notation, problems of both sides."""
    corpus = tmp_path / "real.jsonl"
    if not corpus.exists():
        rows = [
            {"question": f"{n} plus 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(60)
        ]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "seed": 5,
        "tokenizer": {"train": {"vocabulary_size": 320, "documents": 50}},
        "world": {"tokens": BUDGETS},
        "corpora": {"real": {"path": str(corpus), "adapter": "gsm8k"}},
        "problems": {"train": {"count": 20}, "heldout": {"count": 30}},
    }
    return parse_config(DataBuildConfig, {**values, **changes}, "test")


def _files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built")
    build_data(_config(path), path / "data")
    return path


def _documents(out: Path, name: str) -> list[str]:
    encoder, index = load_encoder(out / "tokenizer"), read_index(out / name)
    return [encoder.decode(index.document(number).tolist()) for number in range(index.documents)]


def test_manifest_says_what_is_there(built: Path) -> None:
    out = built / "data"
    manifest = verify_data(out)
    assert list(manifest["sources"]) == [*BUDGETS, "real"]
    for name, facts in manifest["sources"].items():
        index = read_index(out / name)
        assert (facts["documents"], facts["tokens"]) == (index.documents, index.tokens)
        assert facts["largest_token"] == index.all_tokens().max() < manifest["tokenizer"]["vocabulary"] == 320
        last = int(index.lengths[-1])
        if name in BUDGETS:  # the document that reaches the budget is the last one
            assert index.tokens - last < BUDGETS[name] <= index.tokens
    assert manifest["sources"]["real"]["documents"] == 60
    assert manifest["problems"]["train"]["count"] == 20 and manifest["problems"]["heldout"]["count"] == 30
    assert manifest["inputs"]["corpora.real"]["real.jsonl"]["bytes"] == (built / "real.jsonl").stat().st_size
    names = set(_files(out))
    assert not [name for name in names if "partial" in name]
    assert {"manifest.json", "problems/train.jsonl", "tokenizer/tokenizer.json", "web.bin", "web.idx"} <= names


def test_documents_end_once_with_end_of_text(built: Path) -> None:
    end = load_encoder(built / "data" / "tokenizer").end
    for name in BUDGETS:
        index = read_index(built / "data" / name)
        for number in range(index.documents):
            tokens = index.document(number).tolist()
            assert tokens[-1] == end and end not in tokens[:-1]
    first = _documents(built / "data", "real")[3]
    assert first == "Question: 3 plus 1?\nAnswer: 3+1=4\n\\boxed{4}<|end_of_text|>"


def test_heldout_problems_are_not_in_training_text(built: Path) -> None:
    out = built / "data"
    heldout = [json.loads(line) for line in (out / "problems" / "heldout.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (out / "problems" / "train.jsonl").read_text().splitlines()]
    assert not {problem["id"] for problem in heldout} & {problem["id"] for problem in train}
    text = "\n".join(document for name in BUDGETS for document in _documents(out, name))
    assert "Question:" in text
    for problem in heldout:
        assert problem["question"] not in text
        assert not re.search(rf"(?<!\d){re.escape(problem['id'])}(?!\d)", text), problem["id"]
    assert len(heldout) > 5 and re.search(r"(?<!\d)\d+\+\d-\d(?!\d)", text), "computations of this form are in the text"


def test_two_builds_are_equal_to_the_byte(built: Path, tmp_path: Path) -> None:
    shutil.copy(built / "real.jsonl", tmp_path)
    again = tmp_path / "again"
    build_data(_config(built), again)
    assert _files(again) == _files(built / "data")


def test_bytes_are_those_of_megatrons_tool(built: Path, tmp_path: Path) -> None:
    """The steps of Megatron-LM's preprocessing, with transformers' tokenizer: encode, append the end mark, add."""
    import torch
    from megatron.core.datasets import indexed_dataset as megatron
    from transformers import AutoTokenizer

    from megatron_octo.data.corpora.read import ShardReader
    from megatron_octo.data.corpora.shard import list_shards

    tokenizer = AutoTokenizer.from_pretrained(built / "data" / "tokenizer")
    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "real.bin"), dtype=megatron.DType.optimal_dtype(len(tokenizer))
    )
    (shard,) = list_shards(_config(built), "real")
    for document in ShardReader(_config(built), shard):
        tokens = [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "real.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"real.{suffix}").read_bytes() == (built / "data" / f"real.{suffix}").read_bytes()


def test_finished_build_is_kept_and_damage_repaired(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    shutil.copytree(built / "data", out)
    written: list[str] = []
    publish = IndexedWriter.publish
    monkeypatch.setattr(
        IndexedWriter, "publish", lambda self: (written.append(self.prefix.parent.name), publish(self))[1]
    )
    build_data(_config(built), out)
    assert written == []
    content = bytearray((out / "web.bin").read_bytes())
    content[400] ^= 1
    (out / "web.bin").write_bytes(content)
    with pytest.raises(DataError, match="web.bin was altered"):
        verify_data(out)
    (out / "tokenizer" / "tokenizer.json").unlink()
    build_data(_config(built), out)
    assert written == ["web"]
    assert _files(out) == _files(built / "data")


def test_another_configuration_is_refused(built: Path) -> None:
    before = _files(built / "data")
    changed = _config(built, seed=6, world={"tokens": {**BUDGETS, "web": 9000}})
    with pytest.raises(ConfigError) as caught:
        build_data(changed, built / "data")
    assert "settings.seed: 5 -> 6" in str(caught.value)
    assert "settings.world.tokens.web: 3000 -> 9000" in str(caught.value)
    assert _files(built / "data") == before


def test_changed_input_is_refused(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "data", tmp_path / "data")
    original = (built / "real.jsonl").read_text()
    try:
        (built / "real.jsonl").write_text(original.replace("7 plus 1?", "7 plus  1?"))
        with pytest.raises(ConfigError, match=r"inputs.corpora.real.real.jsonl.sha256"):
            build_data(_config(built), tmp_path / "data")
    finally:
        (built / "real.jsonl").write_text(original)


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(DataError, match="written by another process"):
        build_data(_config(tmp_path), tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*values: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(EnvironmentProblem, match="its file system gives no locks.*Lustre: -o flock"):
        build_data(_config(tmp_path), tmp_path / "data")


def test_bad_line_ends_the_build_without_output(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with (tmp_path / "real.jsonl").open("ab") as file:
        file.write(b'{"question": "\xff"}\n')
    with pytest.raises(DataError, match="real.jsonl, line 61: not UTF-8"):
        build_data(config, tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert not list((tmp_path / "data").glob("real.*"))
    skipping = _config(tmp_path, on_bad_line="skip")  # another setting, so another directory
    facts = build_data(skipping, tmp_path / "skipped")["sources"]["real"]["accounts"]
    assert facts["documents"] == 60 and facts["skipped"] == {"not UTF-8": 1}
    assert facts["first"] == ["real.jsonl:61: not UTF-8 at byte 15 of the line"]


def test_mended_input_of_an_unfinished_build_is_taken(tmp_path: Path) -> None:
    config, whole = _config(tmp_path), (tmp_path / "real.jsonl").read_text()
    (tmp_path / "real.jsonl").write_text(whole + "broken\n")
    with pytest.raises(DataError, match="line 61"):
        build_data(config, tmp_path / "mended")
    (tmp_path / "real.jsonl").write_text(whole)
    build_data(config, tmp_path / "mended")
    build_data(config, tmp_path / "fresh")
    assert _files(tmp_path / "mended") == _files(tmp_path / "fresh")


def test_parts_and_forms_of_a_corpus_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plain file, the same in many parts, and the same as a folder of compressed and parquet files."""
    import pyarrow
    import pyarrow.parquet as parquet

    from megatron_octo.data.corpora import shard

    whole = build_data(_config(tmp_path), tmp_path / "whole")["sources"]["real"]
    monkeypatch.setattr(shard, "PART", 500)
    parts = build_data(_config(tmp_path), tmp_path / "parts")["sources"]["real"]
    assert len(shard.list_shards(_config(tmp_path), "real")) > 5
    assert parts == whole and whole["accounts"]["read"] == whole["accounts"]["documents"] == 60
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")
    lines = (tmp_path / "real.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:20])))
    rows = pyarrow.Table.from_pylist([json.loads(line) for line in lines[20:]])
    parquet.write_table(rows, tmp_path / "folder" / "2.parquet", row_group_size=3)
    forms = _config(
        tmp_path,
        corpora={"real": {"path": str(tmp_path / "folder"), "adapter": "gsm8k"}},
        tokenizer={"path": str(tmp_path / "whole" / "tokenizer")},
    )
    manifest = build_data(forms, tmp_path / "forms")
    assert list(manifest["inputs"]["corpora.real"]) == ["1.jsonl.gz", "2.parquet"]
    assert (tmp_path / "forms" / "real.bin").read_bytes() == (tmp_path / "whole" / "real.bin").read_bytes()
    assert manifest["sources"]["real"]["accounts"] == whole["accounts"]


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text('{"question": "1+1?", "generated_solution": "3", "is_correct": false}\n' * 3)
    corpus = {"path": str(tmp_path / "real.jsonl"), "adapter": "openmathinstruct-1"}
    with pytest.raises(
        DataError, match="corpora.real holds no documents; all its 3 records are left out: 3 wrong answer"
    ):
        build_data(_config(tmp_path, corpora={"real": corpus}), tmp_path / "data")


def test_corpus_shorter_than_its_budget_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    corpus = {"path": str(tmp_path / "real.jsonl"), "adapter": "gsm8k", "tokens": "1M"}
    with pytest.raises(DataError, match=r"corpora.real.tokens = 1000000, but its files have only \d+"):
        build_data(_config(tmp_path, corpora={"real": corpus}), tmp_path / "data")
    (tmp_path / "real.jsonl").write_text("")
    with pytest.raises(DataError, match="corpora.real holds no documents"):
        build_data(config, tmp_path / "empty")


def test_settings_of_the_world_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'step'.*did you mean 'steps'"):
        build_data(_config(tmp_path, world={"tokens": BUDGETS, "settings": {"step": 1}}), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_given_tokenizer_is_taken_over(built: Path, tmp_path: Path) -> None:
    given = {"path": str(built / "data" / "tokenizer")}
    manifest = build_data(_config(tmp_path, tokenizer=given), tmp_path / "data")
    assert _files(tmp_path / "data" / "tokenizer") == _files(built / "data" / "tokenizer")
    assert set(manifest["inputs"]["tokenizer.path"]) == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(DataError, match="nowhere/tokenizer.json does not exist"):
        build_data(_config(tmp_path, tokenizer={"path": str(tmp_path / "nowhere")}), tmp_path / "other")


def test_a_tokenizer_file_stands_for_its_directory(built: Path, tmp_path: Path) -> None:
    given = {"path": str(built / "data" / "tokenizer" / "tokenizer.json")}
    build_data(_config(tmp_path, tokenizer=given, world={}, problems={}), tmp_path / "data")
    assert _files(tmp_path / "data" / "tokenizer") == _files(built / "data" / "tokenizer")
    with pytest.raises(DataError, match="nowhere/tokenizer.json does not exist"):
        build_data(_config(tmp_path, tokenizer={"path": str(tmp_path / "nowhere/tokenizer.json")}), tmp_path / "other")


def test_a_tokenizer_smaller_than_asked_for_is_told(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = {"train": {"vocabulary_size": 2000}}
    manifest = build_data(_config(tmp_path, tokenizer=trained, world={}, problems={}), tmp_path / "data")
    found = manifest["tokenizer"]["vocabulary"]
    assert found < 2000
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "fewer" in line]
    assert said.startswith(f"octo: note: the tokenizer has {found} entries, fewer than tokenizer.train.voc")
    assert "vocabulary_size = 2,000:" in said and said.endswith(f"model.vocabulary: {found}")
    build_data(
        _config(tmp_path, tokenizer={"train": {"vocabulary_size": found}}, world={}, problems={}), tmp_path / "b"
    )
    assert "fewer" not in capsys.readouterr().err


def test_a_tokenizer_that_loses_line_breaks_is_told(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words of text, and 2 + 2 = 4"] * 9), model_prefix=str(tmp_path / "eats"),
        vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    said = []
    for number, given in enumerate((tmp_path / "eats.model", built / "data" / "tokenizer")):
        config = _config(tmp_path, tokenizer={"path": str(given)}, world={}, problems={})
        build_data(config, tmp_path / f"data{number}")
        said.append([line for line in capsys.readouterr().err.splitlines() if "loses" in line])
    ((line,), nothing) = said
    assert (
        f"note: {tmp_path / 'eats.model'} loses" in line and "comes back as 'Question: what is 2 + 2? Answer: 4" in line
    )
    assert nothing == []


def test_a_tokenizer_is_known_again_by_what_decides_tokens(built: Path, tmp_path: Path) -> None:
    """As the manifest states it, in a directory with other things, and with a chat template more; no other one is."""
    pairs, mine = {"data.mixture.web": built / "data" / "web"}, tmp_path / "mine"
    shutil.copytree(built / "data" / "tokenizer", mine)
    (mine / "config.json").write_text("{}")
    check_one_tokenizer(mine, pairs)
    (mine / "chat_template.jinja").write_text("{{ messages }}")
    form = json.loads((mine / "tokenizer.json").read_text())
    other_spelling = {**form, "padding": {"direction": "Right"}, "version": "0.9"}
    other_spelling["model"] = {**form["model"], "merges": [" ".join(merge) for merge in form["model"]["merges"]]}
    other_spelling["model"].pop("dropout")
    (mine / "tokenizer.json").write_text(json.dumps(other_spelling, indent=4))
    check_one_tokenizer(mine, pairs)
    check_one_tokenizer(tmp_path / "not there", pairs)
    first, second, *_ = form["model"]["vocab"]
    vocab = form["model"]["vocab"]
    swapped = {**vocab, first: vocab[second], second: vocab[first]}
    for change in ({"model": {**form["model"], "vocab": swapped}}, {"pre_tokenizer": None}, {"added_tokens": []}):
        (mine / "tokenizer.json").write_text(json.dumps({**form, **change}))
        with pytest.raises(DataError, match=f"{built / 'data' / 'tokenizer'} .*, and data.tokenizer is {mine} ") as no:
            check_one_tokenizer(mine, pairs)
        assert no.value.fix.startswith(f"set data.tokenizer to {built / 'data' / 'tokenizer'}, or build")


def test_a_tokenizer_that_was_altered_where_it_lies_is_to_be_restored(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "data", tmp_path / "data")
    form = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    form.write_text(json.dumps({**json.loads(form.read_text()), "pre_tokenizer": None}))
    with pytest.raises(DataError, match="fix: .* was altered since: restore it"):
        check_one_tokenizer(form.parent, {"data.mixture.web": tmp_path / "data" / "web"})


def test_a_sentence_piece_model_counts_only_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"one")
    alone = token_rules(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"two")
    assert token_rules(tmp_path) not in (alone, None)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    read = token_rules(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"one")
    assert token_rules(tmp_path) == read
    (tmp_path / "tokenizer.json").write_text("[")
    assert token_rules(tmp_path) is None


def test_only_the_files_of_a_tokenizer_count(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside it lie weights and what a download leaves; beside a corpus, files of other forms, which are told."""
    given, corpus = tmp_path / "given", tmp_path / "corpus"
    shutil.copytree(built / "data" / "tokenizer", given)
    (given / ".cache").mkdir()
    (given / "model.safetensors").write_bytes(b"weights")
    corpus.mkdir()
    for name in ("a.jsonl", "b.jsonl.bz2", "c.JSONL"):
        (corpus / name).write_text('{"text": "one of its texts"}\n')
    config = _config(
        tmp_path, tokenizer={"path": str(given)}, corpora={"c": {"path": str(corpus)}}, world={}, problems={}
    )
    manifest = build_data(config, tmp_path / "data")
    assert set(manifest["inputs"]["tokenizer.path"]) == {"tokenizer.json", "tokenizer_config.json"}
    assert manifest["not_read"] == {"c": {"files": 2, "first": ["b.jsonl.bz2", "c.JSONL"]}}
    assert "octo: corpora.c: 2 files not read" in capsys.readouterr().err


def test_a_sentence_piece_file_is_a_tokenizer(tmp_path: Path) -> None:
    given = Path(__file__).parents[1] / "golden" / "megatron_lm" / "sentencepiece.model"
    config = _config(tmp_path, tokenizer={"path": str(given)}, world={}, problems={})
    manifest = build_data(config, tmp_path / "data")
    assert list(manifest["inputs"]["tokenizer.path"]) == [given.name]
    assert (tmp_path / "data" / "tokenizer" / "tokenizer.model").read_bytes() == given.read_bytes()
    assert verify_data(tmp_path / "data")["documents"] == 60


def test_another_end_mark_is_another_build(built: Path, tmp_path: Path) -> None:
    """tokenizer_config.json names it: the copy of a build that was cut off must not outlive a change."""
    given = tmp_path / "given"
    shutil.copytree(built / "data" / "tokenizer", given)
    config = _config(tmp_path, tokenizer={"path": str(given)}, corpora={}, world={"tokens": {"web": 2000}})
    before = build_data(config, tmp_path / "data")["tokenizer"]["end_of_text"]
    settings = json.loads((given / "tokenizer_config.json").read_text())
    (given / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|begin_of_text|>"}))
    with pytest.raises(ConfigError, match="holds another build: inputs.tokenizer.path"):
        build_data(config, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()  # as if it had been killed
    after = build_data(config, tmp_path / "data")["tokenizer"]["end_of_text"]
    assert after != before
    assert read_index(tmp_path / "data" / "web").document(0)[-1] == after


def test_configuration_survives_its_file(built: Path, tmp_path: Path) -> None:
    config = _config(built, corpora={"real": {"path": "${OCTO_DATA:-data}/x", "tokens": "5K"}})
    dump_config(config, tmp_path / "data.yaml")
    assert load_config(DataBuildConfig, tmp_path / "data.yaml") == config


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_workers_give_the_same_files(tmp_path: Path) -> None:
    config = _config(tmp_path, world={"tokens": {"web": 600}})
    manifest = build_data(config, tmp_path / "one")
    assert build_data(config, tmp_path / "two", workers=2) == manifest
    assert _files(tmp_path / "two") == _files(tmp_path / "one")


@pytest.mark.parametrize("content", ["[]", "3", "{}"])
def test_a_manifest_of_another_form_is_told_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="manifest.json is not what a build writes there"):
        build_data(_config(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == content


def test_a_place_where_no_directory_can_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="/proc/data: cannot be made"):
        build_data(_config(tmp_path), Path("/proc/data"))

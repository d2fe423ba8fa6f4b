"""The global order: Megatron's own within an epoch, every token once an epoch, never changed by asking for more."""

from __future__ import annotations

import importlib.machinery
import json
import pickle
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_octo.config.mixture import DataConfig, Source
from megatron_octo.data.index.pairs import bin_path, read_index
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.data.mix import mixture
from megatron_octo.data.mix.identity import content_digest
from megatron_octo.data.mix.mixture import check_tokenizer, check_tokens
from megatron_octo.data.mix.order import compiled_helper
from megatron_octo.data.mix.reader import TrainDataset, build_train_dataset, windows
from megatron_octo.errors import DataError, EnvironmentProblem
from megatron_octo.train.data import Batches

LENGTH = 16
UNIQUE = 70_000  # above 16 bit, so that each token of a source can have a number of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources whose tokens are all different: a window shows which tokens of which document it holds."""
    path = tmp_path_factory.mktemp("sources")
    for name, documents, first in (("web", 300, 0), ("qa", 60, 20_000), ("tiny", 3, 40_000)):
        chance, token, texts = random.Random(name), first, []
        for _ in range(documents):
            texts.append(list(range(token, token := token + chance.randint(5, 40))))
        write_indexed(path / name, texts, UNIQUE)
    return path


def _data(folder: Path, seed: int = 3, length: int = LENGTH, **weights: float) -> DataConfig:
    chosen = {name: Source(path=folder / name, weight=weight) for name, weight in weights.items()}
    return DataConfig(tokenizer=folder, mixture=chosen, sequence_length=length, seed=seed)


def _tokens(dataset: TrainDataset, count: int | None = None) -> list[list[int]]:
    return [dataset[number]["tokens"].tolist() for number in range(len(dataset) if count is None else count)]


def test_items(folder: Path, tmp_path: Path) -> None:
    dataset = build_train_dataset(_data(folder, web=1), 20, tmp_path)
    assert len(dataset) == 20
    item = dataset[7]
    assert {key: (tuple(value.shape), value.dtype) for key, value in item.items() if key != "dataset_id"} == {
        "tokens": ((LENGTH,), torch.int64),
        "labels": ((LENGTH,), torch.int64),
        "position_ids": ((LENGTH,), torch.int64),
        "loss_mask": ((LENGTH,), torch.float32),
    }
    assert item["tokens"][1:].equal(item["labels"][:-1]) and item["loss_mask"].all()
    assert item["position_ids"].tolist() == list(range(LENGTH))
    for outside in (-1, 20):
        with pytest.raises(IndexError):
            dataset[outside]


def test_order_is_megatrons_within_the_first_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod, vocab_size, unique_identifiers = 1, UNIQUE, {"class": "Tokenizer"}

    config = GPTDatasetConfig(
        random_seed=3, sequence_length=LENGTH, blend=([str(folder / "qa"), str(folder / "web")], [2.0, 8.0]),
        split="1,0,0", path_to_cache=str(tmp_path / "megatron"), tokenizer=Tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)  # megatron asks without a process group
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [200, 0, 0], lambda: True, config).build()[0]
    ours = build_train_dataset(_data(folder, web=0.8, qa=0.2), 200, tmp_path / "ours")
    assert max(facts["epochs"] for facts in ours.facts.values()) <= 1
    for number in range(200):
        for key, value in ours[number].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[number][key])), (number, key)


def test_more_windows_never_change_earlier_ones(folder: Path, tmp_path: Path) -> None:
    data = _data(folder, web=0.5, qa=0.3, tiny=0.2)
    long = build_train_dataset(data, 2000, tmp_path)
    assert all(facts["epochs"] > 2 for facts in long.facts.values())
    for sequences in (1, 37, 700):
        assert _tokens(build_train_dataset(data, sequences, tmp_path)) == _tokens(long, sequences)


def test_order_does_not_depend_on_key_order_or_cache(folder: Path, tmp_path: Path) -> None:
    once = _tokens(build_train_dataset(_data(folder, web=0.6, qa=0.4), 300, tmp_path / "a"))
    assert once == _tokens(build_train_dataset(_data(folder, qa=0.4, web=0.6), 300, tmp_path / "b"))
    assert once != _tokens(build_train_dataset(_data(folder, seed=4, web=0.6, qa=0.4), 300, tmp_path / "a"))
    dataset = build_train_dataset(_data(folder, web=0.6, qa=0.4), 300, tmp_path / "a")
    numbers = random.Random(0).sample(range(300), 300)
    assert [once[number] for number in numbers] == [dataset[number]["tokens"].tolist() for number in numbers]
    assert _tokens(pickle.loads(pickle.dumps(dataset))) == once


def test_each_epoch_reads_every_token_once_but_a_rest(folder: Path, tmp_path: Path) -> None:
    per_epoch = (read_index(folder / "qa").tokens - 1) // LENGTH
    read = _tokens(build_train_dataset(_data(folder, qa=1), 3 * per_epoch, tmp_path))
    epochs = [[token for window in read[e * per_epoch : (e + 1) * per_epoch] for token in window] for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == per_epoch * LENGTH
    assert epochs[0] != epochs[1] != epochs[2]
    assert max(Counter(token for epoch in epochs for token in epoch).values()) == 3


def test_mixture_proportions_and_facts(folder: Path, tmp_path: Path) -> None:
    dataset = build_train_dataset(_data(folder, web=0.7, qa=0.2, tiny=0.1), 1000, tmp_path)
    counts = Counter(dataset.window(number).source for number in range(1000))
    assert counts == {"web": 700, "qa": 200, "tiny": 100}
    early = Counter(dataset.window(number).source for number in range(50))
    assert all(abs(early[name] - 50 * share) <= 1 for name, share in {"web": 0.7, "qa": 0.2, "tiny": 0.1}.items())
    facts = dataset.facts["tiny"]
    assert (facts["windows"], facts["share"]) == (100, pytest.approx(0.1))
    assert facts["epochs"] == 100 / facts["windows_per_epoch"] > 1


def test_windows_name_their_documents(folder: Path, tmp_path: Path) -> None:
    data = _data(folder, web=0.7, qa=0.3)
    dataset = build_train_dataset(data, 400, tmp_path)
    for found in windows(data, 250, 100, tmp_path):
        item, index = dataset[found.window], read_index(folder / found.source)
        held = {int(token) for number in found.documents for token in index.document(number)}
        seen = set(item["tokens"].tolist()) | set(item["labels"].tolist())
        assert seen <= held
        assert all(seen & set(index.document(number).tolist()) for number in found.documents)
        assert found.epoch == found.number // dataset.facts[found.source]["windows_per_epoch"]


def test_many_at_once_share_one_cache(folder: Path, tmp_path: Path) -> None:
    data = _data(folder, web=0.7, tiny=0.3)
    with ThreadPoolExecutor(8) as pool:
        datasets = list(pool.map(lambda _: build_train_dataset(data, 300, tmp_path), range(8)))
    orders = [_tokens(dataset) for dataset in datasets]
    assert all(order == orders[0] for order in orders)
    assert len(list(tmp_path.iterdir())) == 3 and not list(tmp_path.glob(".partial-*"))


def test_cache_follows_the_data(tmp_path: Path) -> None:
    """Megatron's cache goes by the path: data built anew under it would be read with the old index."""
    data = _data(tmp_path, web=1)
    for documents in (10, 40):  # as many tokens, so that nothing but their borders tells the two apart
        write_indexed(tmp_path / "web", [[n] * (400 // documents) for n in range(documents)], UNIQUE)
        dataset = build_train_dataset(data, 20, tmp_path / "cache")
        fresh = build_train_dataset(data, 20, tmp_path / f"fresh{documents}")
        assert _tokens(dataset) == _tokens(fresh)


def test_damaged_cache_is_named(folder: Path, tmp_path: Path) -> None:
    build_train_dataset(_data(folder, web=1), 10, tmp_path)
    next(tmp_path.rglob("shuffle_index.npy")).write_bytes(b"")
    with pytest.raises(DataError, match="index cache .* is damaged.*delete the directory"):
        build_train_dataset(_data(folder, web=1), 10, tmp_path)


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
def test_a_cache_that_was_copied_in_part_is_not_read(folder: Path, tmp_path: Path, name: str) -> None:
    """Of the right size, and zeros from some place on: one window would be read over and over."""
    build_train_dataset(_data(folder, web=1), 10, tmp_path)
    path = next(tmp_path.rglob(f"{name}.npy"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    with pytest.raises(DataError, match=rf"index cache .* is damaged \({name}.npy is not as it was written\)"):
        build_train_dataset(_data(folder, web=1), 10, tmp_path)


def test_too_long_a_sequence_names_the_source(folder: Path, tmp_path: Path) -> None:
    tokens = read_index(folder / "tiny").tokens
    assert len(build_train_dataset(_data(folder, length=tokens - 1, tiny=1), 2, tmp_path)) == 2
    with pytest.raises(
        DataError, match=rf"data.mixture.tiny .* has {tokens} tokens in 3 documents.* needs {tokens + 1}"
    ):
        build_train_dataset(_data(folder, length=tokens, web=0.5, tiny=0.5), 2, tmp_path)


def test_truncated_source(tmp_path: Path) -> None:
    write_indexed(tmp_path / "web", [[1, 2, 3]] * 50, UNIQUE)
    bin_path(tmp_path / "web").write_bytes(b"\0" * 300)
    with pytest.raises(DataError, match="web.bin is damaged: 300 bytes"):
        build_train_dataset(_data(tmp_path, web=1), 2, tmp_path / "cache")


def test_vocabulary(tmp_path: Path) -> None:
    from megatron_octo.data.index.train_tokenizer import train_tokenizer

    train_tokenizer(["some text"], 300, tmp_path)
    size = max(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    check_tokenizer(_data(tmp_path, web=1), size)
    with pytest.raises(DataError, match=f"has {size} entries, model.vocabulary is {size - 1}"):
        check_tokenizer(_data(tmp_path, web=1), size - 1)


def test_a_vocabulary_with_gaps_counts_to_its_end(tmp_path: Path) -> None:
    from megatron_octo.config.index import IndexConfig
    from megatron_octo.data.index.encode import load_encoder, vocabulary_of
    from megatron_octo.data.index.train_tokenizer import train_tokenizer

    train_tokenizer(["some text"], 300, tmp_path)
    path = tmp_path / "tokenizer.json"
    plain = json.loads(path.read_text())
    plain["model"]["vocab"] = {
        token: number if number < 200 else number + 70_000 for token, number in plain["model"]["vocab"].items()
    }
    path.write_text(json.dumps(plain))
    encoder = load_encoder(tmp_path, IndexConfig())
    tokens = next(encoder.documents(["some text"]))
    assert encoder.rows == vocabulary_of(tmp_path) > max(tokens) > 70_000
    assert write_indexed(tmp_path / "web", [tokens], encoder.rows).largest_token == max(tokens)


def test_tokens_beyond_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_indexed(tmp_path / "web", [[1, 90], [5, 2]], 91)
    assert check_tokens(tmp_path / "web", "data.mixture.web", 91)
    with pytest.raises(DataError, match=r"data.mixture.web .* holds token 90, model.vocabulary is 90"):
        check_tokens(tmp_path / "web", "data.mixture.web", 90)
    monkeypatch.setattr(mixture, "_SCANNED", 4)  # bytes: what is larger is looked at as it is read
    assert not check_tokens(tmp_path / "web", "data.mixture.web", 90)


def test_a_token_below_zero_is_met_as_it_is_and_refused(tmp_path: Path) -> None:
    """Megatron's reader would take -1 for its padding mark: a 0 that no loss counts."""
    write_indexed(tmp_path / "web", [list(range(1, 50))] * 4, UNIQUE)
    tokens = np.fromfile(bin_path(tmp_path / "web"), np.int32)
    for damaged in (-1, -5):
        tokens[60] = damaged
        tokens.tofile(bin_path(tmp_path / "web"))
        dataset = build_train_dataset(_data(tmp_path, web=1), 12, tmp_path / "cache")
        items = [dataset[number] for number in range(12)]
        assert min(int(item["tokens"].min()) for item in items) == damaged
        assert all(item["loss_mask"].all() for item in items)
        with pytest.raises(DataError, match=f"data.mixture.web .* holds token {damaged}, model.vocabulary is 91"):
            check_tokens(tmp_path / "web", "data.mixture.web", 91)
        run = SimpleNamespace(
            batch=SimpleNamespace(micro_batch=1, global_batch=12), data=SimpleNamespace(sequence_length=LENGTH),
            parallel=SimpleNamespace(context=1), model=SimpleNamespace(vocabulary=91),
        )  # fmt: skip
        alone = SimpleNamespace(
            device="cpu", data_size=1, data_rank=0, is_first_stage=True, is_last_stage=True, world_size=1
        )
        with pytest.raises(DataError, match=f"of the mixture holds token {damaged}, model.vocabulary is 91"):
            Batches(run, alone, dataset).of_step(0)


@pytest.mark.parametrize("place", [0, 30_000, 59_999])
def test_a_dataset_is_told_by_its_tokens_too(tmp_path: Path, place: int) -> None:
    """What is not looked at is less than a 64th of the file in one piece."""
    for name in ("one", "copy", "hole"):
        write_indexed(tmp_path / name, [[7] * 60_000, [8] * 60_000], UNIQUE)
    tokens = np.fromfile(bin_path(tmp_path / "hole"), np.int32)
    tokens[place : place + 2000] = 0
    tokens.tofile(bin_path(tmp_path / "hole"))
    one, copy, hole = (content_digest(read_index(tmp_path / name)) for name in ("one", "copy", "hole"))
    assert one == copy and one["index"] == hole["index"] and one["tokens"] != hole["tokens"]
    write_indexed(tmp_path / "none", [], UNIQUE)
    assert content_digest(read_index(tmp_path / "none"))["tokens"]


@pytest.mark.parametrize("change", [{"length": 8}, {"sequences": 600}, {"seed": 4}])
def test_a_cache_serves_its_own_order_only(folder: Path, tmp_path: Path, change: dict[str, int]) -> None:
    """Of each change alone: 20 windows are of one epoch, whatever their length, and 600 are of two."""
    other = {"sequences": 20, **change}
    build_train_dataset(_data(folder, web=1), 20, tmp_path / "shared")
    sequences = other.pop("sequences")
    orders = [
        _tokens(build_train_dataset(_data(folder, web=1, **other), sequences, tmp_path / c)) for c in ("shared", "own")
    ]
    assert orders[0] == orders[1]


def test_missing_compiled_helper_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of another platform has no compiled helper."""
    finder = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda name, *place: None)
    compiled_helper.cache_clear()
    with pytest.raises(EnvironmentProblem, match="compiled dataset helper.*only-binary"):
        compiled_helper()
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", finder)
    assert compiled_helper().build_blending_indices

"""No window is lost or read twice: resumes in and between epochs, at a decay, on fewer ranks; other data is refused.

Reading has no worker processes: a window is a pure function of its number, read by the rank that trains on it, so
there is no order of workers to keep. What stands in its place here: two ranks and one read the same global order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from megatron_octo.checkpoint.store import latest_checkpoint
from megatron_octo.config.mixture import DataConfig, Source
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.data.mix.reader import build_train_dataset
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.runtime.launch import launch
from megatron_octo.train.api import load_run
from megatron_octo.train.ledger import who
from megatron_octo.train.start import plan_start

HERE = Path(__file__).parent
TINY = HERE.parent / "distributed"
sys.path.insert(0, str(TINY))

from tiny_run import RATE, STEP_TOKENS, values  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BATCH, STEPS, EPOCH = 4, 10, 12
"""Sequences of a step, steps of a run, and windows of one pass over the source: an epoch is three steps."""


def write_source(prefix: Path, lengths: list[int]) -> None:
    documents = [[(start + 2 * place) % 90 + 1 for place in range(n)] for start, n in enumerate(lengths)]
    write_indexed(prefix, documents, 91)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    (folder / "tokenizer").mkdir()
    write_source(folder / "web", [30] * 13)  # 390 tokens: 12 windows of 32 and a label
    write_source(folder / "other-web", [30] * 12 + [31])
    write_source(folder / "more", [29] * 8)  # 232 tokens: 7 windows
    run = values(folder)
    run["data"]["mixture"] = {"web": {"path": str(folder / "web"), "weight": 1.0}}
    decay = {"decay": 2 * STEP_TOKENS, "shape": "linear"}
    run["schedule"] = {"kind": "wsd", "learning_rate": RATE, "tokens": STEPS * STEP_TOKENS, **decay}
    run["checkpoint"] = {"every": STEP_TOKENS, "keep": 99}
    path, there = folder / "run.yaml", {"PYTHONPATH": f"{HERE}:{TINY}"}
    path.write_text(yaml.safe_dump(run))
    for mode, ranks in (("two", 2), ("one", 1)):
        arguments = [mode, str(path), str(folder / f"{mode}.json")]
        launch("order_worker", arguments, ranks, folder / "logs", 1, environment=there)
    return folder


@pytest.fixture(scope="module")
def consumed(folder):
    """Of each run, in the order trained: (step, rank, window, hash)."""
    found: dict[str, list[tuple]] = {}
    for file, rank in (("two.0.json", 0), ("two.1.json", 1), ("one.0.json", 0)):
        for name, step, window, digest in json.loads((folder / file).read_text())["consumed"]:
            found.setdefault(name, []).append((step, rank, window, digest))
    return {name: sorted(lines, key=lambda line: line[:2]) for name, lines in found.items()}


def ordered_hash(lines) -> str:
    """One name for which windows with which content were read, in which order."""
    return hashlib.sha256(json.dumps([line[-2:] for line in lines]).encode()).hexdigest()


def alone(folder: Path, seed: int, first: int, count: int) -> list[tuple[int, str]]:
    """The same from seed, mixture and position alone: no run, no checkpoint, another cache."""
    run = load_run(folder / "run.yaml", [f"data.seed={seed}"])
    dataset = build_train_dataset(run.data, first + count, folder / "independent")
    items = ((window, dataset[window]) for window in range(first, first + count))
    return [(window, hashlib.sha256(content(item)).hexdigest()) for window, item in items]


def content(item) -> bytes:
    return item["tokens"].numpy().tobytes() + item["labels"].numpy().tobytes()


def weights(run_dir: Path) -> dict[str, str]:
    files = json.loads((latest_checkpoint(run_dir) / "seal.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith(".distcp")}


def test_everything_trained(folder):
    for file in ("two.0.json", "two.1.json", "one.0.json"):
        ended = json.loads((folder / file).read_text())["ended"]
        failed = {name for name, end in ended.items() if end["error"]}
        assert failed == ({"replaced", "replaced-on"} if file == "one.0.json" else set()), ended


def test_an_uninterrupted_run_reads_the_order_that_seed_and_mixture_say(folder, consumed):
    assert len(consumed["whole"]) == STEPS * BATCH
    assert ordered_hash(consumed["whole"]) == ordered_hash(alone(folder, 3, 0, STEPS * BATCH))


@pytest.mark.parametrize(
    ("place", "step"), [("inside an epoch", 2), ("between epochs", 3), ("where the decay starts", 8)]
)
def test_a_resume_loses_no_window_and_reads_none_twice(folder, consumed, place, step):
    assert (step * BATCH % EPOCH == 0) == (place == "between epochs")
    assert f"cut {step}" in json.loads((folder / "one.0.json").read_text())["ended"], "a leg ended here"
    assert [line[2] for line in consumed["cut"]] == list(range(STEPS * BATCH))
    assert ordered_hash(consumed["cut"]) == ordered_hash(consumed["whole"])
    assert weights(folder / "cut") == weights(folder / "whole")


def test_each_epoch_reads_every_window_once(folder):
    dataset = build_train_dataset(load_run(folder / "run.yaml").data, STEPS * BATCH, folder / "independent")
    for epoch in range(3):
        numbers = [dataset.window(window) for window in range(epoch * EPOCH, (epoch + 1) * EPOCH)]
        assert sorted(window.number for window in numbers) == list(range(epoch * EPOCH, (epoch + 1) * EPOCH))
        assert {window.epoch for window in numbers} == {epoch}


def test_two_ranks_then_one_read_the_same_global_order(consumed):
    ranks = {(step, rank) for step, rank, _, _ in consumed["resized"]}
    assert ranks == {*((step, rank) for step in range(3) for rank in (0, 1)), *((step, 0) for step in range(3, STEPS))}
    assert ordered_hash(consumed["resized"]) == ordered_hash(consumed["whole"])


def test_a_branch_reads_on_or_anew(folder, consumed):
    on = alone(folder, 3, 8 * BATCH, 2 * BATCH)
    assert ordered_hash(consumed["on"]) == ordered_hash(on) == ordered_hash(consumed["whole"][8 * BATCH :])
    assert ordered_hash(consumed["fresh"]) == ordered_hash(alone(folder, 77, 0, 2 * BATCH))


def windows_by_source(folder: Path, lines) -> list[tuple[str, int]]:
    """What was read, told by content alone: each window's source and its number there. Epochs differ in their order."""
    known = {}
    for name in ("web", "more"):
        data = load_run(folder / "run.yaml").data
        data = data.model_copy(update={"mixture": {name: Source(path=folder / name, weight=1.0)}})
        dataset = build_train_dataset(data, 48, folder / "independent")
        for number in range(48):
            known.setdefault(hashlib.sha256(content(dataset[number])).hexdigest(), []).append((name, number))
    found, had = [], set()
    for line in lines:
        place = next(place for place in known[line[3]] if place not in had)
        had.add(place)
        found.append(place)
    return found


def test_a_run_changes_its_mixture_on_the_way_and_repeats_no_window(folder, consumed):
    """Cut at the border, and taken on by one rank where two had read: in the order of the run that was not."""
    assert ordered_hash(consumed["phased"]) == ordered_hash(consumed["phased-whole"])
    read = windows_by_source(folder, consumed["phased"])
    assert read[: 5 * BATCH] == [("web", number) for number in range(5 * BATCH)]
    after = read[5 * BATCH :]
    assert [number for name, number in after if name == "web"] == list(range(20, 25)), "a quarter, after what was read"
    assert [number for name, number in after if name == "more"] == list(range(15))


def test_a_mixture_that_is_to_come_may_still_change(folder, consumed):
    """A run without phases gets one where it stands; it becomes, to the bit, the run that had it from its start."""
    assert ordered_hash(consumed["later"]) == ordered_hash(consumed["phased-whole"])
    assert weights(folder / "later") == weights(folder / "phased-whole")


def test_a_branch_with_another_mixture_reads_on_in_every_source(folder, consumed):
    read = windows_by_source(folder, consumed["whole"][: 8 * BATCH] + consumed["other"])
    assert len(set(read)) == len(read) == 10 * BATCH
    after = read[8 * BATCH :]
    assert [number for name, number in after if name == "web"] == list(range(32, 36))
    assert [number for name, number in after if name == "more"] == list(range(4))
    lineage = json.loads((folder / "other" / "lineage.json").read_text())
    said = "goes on at window 32 with another mixture: more 0.5, web 0.5 (was web 1)"
    assert lineage["carried"]["data"] == said
    assert lineage["history"] == [{"first": 0, "weights": {"web": 1.0}}]


def test_who_names_the_steps_that_read_a_document(folder, consumed):
    """Of real run directories: the parent's steps and its branch's are those whose windows hold the document."""
    read = {}
    for name, last in (("whole", STEPS * BATCH), ("other", 10 * BATCH)):
        start = plan_start(load_run(folder / name / "config.yaml"))
        dataset = build_train_dataset(start.run.data, last, folder / "independent", start.blends)
        read[name] = [(step, dataset.window(window)) for step, _, window, _ in consumed[name]]
    document = next(window.documents[0] for _, window in read["other"] if window.source == "web")
    runs = who(folder / "other", number=document, source="web")["runs"]
    found = {Path(one["directory"]).name: one["readings"] for one in runs}
    for name, lines in read.items():
        holds = [(step, w.window) for step, w in lines if w.source == "web" and document in w.documents]
        assert holds and [(one["step"] - 1, one["window"]) for one in found[name]] == holds
        assert {one["state"] for one in found[name]} == {"read"}


OTHER = ["data.mixture.web.weight=0.5", "data.mixture.more={{path: other, weight: 0.5}}"]
PHASE = "data.phases=[{{at: {at}, mixture: {{web: {{path: {folder}/web, weight: 1.0}}}}}}]"


@pytest.mark.parametrize(
    ("how", "overrides", "said"),
    [
        ("resume", OTHER, "data.mixture.web.weight: 1.0 -> 0.5"),
        ("resume", OTHER, "data.mixture.more: None -> "),
        ("resume", [PHASE], "data.phases: None -> "),
        *(
            (how, [override], said)
            for how in ("resume", "branch that reads on")
            for override, said in [
                ("data.mixture.web.path=other", "data.mixture.web.path: "),
                ("data.seed=4", "data.seed: 3 -> 4"),
                ("data.sequence_length=16", "data.sequence_length: 32 -> 16"),
            ]
        ),
    ],
)
def test_a_changed_blend_is_refused(folder, how, overrides, said):
    changes = [override.format(at=9 * STEP_TOKENS, folder=folder) for override in overrides]
    stated = [f"out={folder / 'whole'}", *changes]
    if how != "resume":
        fork = f"{{parent: {folder / 'whole'}, at: {8 * STEP_TOKENS}, data: continue}}"
        stated = [f"out={folder / 'never'}", f"start.fork={fork}", "schedule.learning_rate=null", *changes]
    with pytest.raises(ConfigError) as refused:
        plan_start(load_run(folder / "run.yaml", stated))
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["replaced", "replaced-on"])
def test_another_dataset_under_the_same_path_is_refused(folder, name):
    """By a run that goes on and by a branch that reads on; a branch with data of its own does not mind."""
    ended = json.loads((folder / "one.0.json").read_text())["ended"][name]
    assert ended["error"] == "DataError"
    assert f"data.mixture.web ({folder / 'web'}) is not the dataset that 'tiny' has read" in ended["text"]
    assert "fix: put the one back whose .idx has SHA-256" in ended["text"]


def test_a_cached_index_of_another_seed_is_not_used(folder, tmp_path):
    data = load_run(folder / "run.yaml").data
    build_train_dataset(data, EPOCH, tmp_path)
    [mine] = (path.parent for path in tmp_path.glob("*/shuffle_index.npy"))
    other = data.model_copy(update={"seed": 4})
    orders = [[window.documents for window in windows] for windows in (drawn(data, tmp_path), drawn(other, tmp_path))]
    assert orders[0] != orders[1], "one cache holds both"
    [theirs] = (path.parent for path in tmp_path.glob("*/shuffle_index.npy") if path.parent != mine)
    shutil.rmtree(mine)
    theirs.rename(mine)
    with pytest.raises(DataError, match="it holds the order .*'seed': 4.*, not .*'seed': 3.*fix: delete the directory"):
        build_train_dataset(data, EPOCH, tmp_path)


def drawn(data: DataConfig, cache: Path) -> list:
    dataset = build_train_dataset(data, EPOCH, cache)
    return [dataset.window(window) for window in range(EPOCH)]

"""What a careless user types at `octo train`: one line that names the mistake and its cure, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_octo.checkpoint import store
from megatron_octo.cli import root as cli
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.digest import spot_digest
from megatron_octo.data.index.table import pair_files
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.errors import DataError
from megatron_octo.runtime import launch
from megatron_octo.train.forecast import forecast_file

RUN: dict[str, Any] = {
    "name": "run",
    "out": "run",
    "dtype": "fp32",
    "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 91, "max_positions": 64},
    "data": {
        "tokenizer": "tokenizer",
        "mixture": {"web": {"path": "web", "weight": 0.7}, "math": {"path": "math", "weight": 0.3}},
        "sequence_length": 32,
    },
    "batch": {"global_batch": 8, "micro_batch": 2},
    "schedule": {"learning_rate": 1e-3, "tokens": "10K"},
    "checkpoint": {"every": "5K"},
}
CONSTANT = RUN["schedule"]
FILES: dict[str, Any] = {
    "run.yaml": RUN,
    "trained.yaml": {**RUN, "out": "trained"},
    "forgotten.yaml": {**RUN, "out": "forgotten"},
    "unsealed.yaml": {**RUN, "out": "unsealed"},
    "typo.yaml": {**RUN, "checkpoint": {"evry": "5K"}},
    "pointer.yaml": {**RUN, "out": "pointer"},
    "list.yaml": {**RUN, "data": {**RUN["data"], "mixture": [{"path": "web", "weight": 1}]}},
}
TEXTS = {
    "empty.yaml": b"",
    "broken.yaml": b"model: {layers: 2",
    "bytes.yaml": b"\xff\xfe\x00name",
    "twice.yaml": b"name: a\nseed: 1\nseed: 2\n",
    "a-file": b"",
    "web-damaged.bin": b"\0" * 10,
    "web-damaged.idx": b"MMIDIDX",
}

Octo = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with run files, traps, real data, and runs that have trained."""
    folder = tmp_path_factory.mktemp("things")
    for name, values in FILES.items():
        (folder / name).write_text(yaml.safe_dump(values))
    for name, content in TEXTS.items():
        (folder / name).write_bytes(content)
    _data(folder)
    for name in ("trained", "forgotten", "unsealed", "pointer"):
        for step in (10, 20):
            _checkpoint(folder / name, RunConfig.model_validate({**RUN, "out": name}), step)
    (folder / "forgotten/latest").unlink()
    for leftover in (folder / "unsealed").rglob("seal.json"):
        leftover.unlink()
    (folder / "unsealed/latest").unlink()
    (folder / "pointer/latest").write_text("step_00000099\n")
    return folder


@pytest.fixture
def octo(
    things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Octo]:
    """`octo train ARGUMENTS` inside this process, among `things`; a run that would start is noted."""
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "launch", lambda module, arguments, *_, **__: print("started", *arguments))
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octo", "train", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield run
    signal.signal(signal.SIGTERM, handler)


def _data(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    documents = [[(start + place) % 90 + 1 for place in range(30)] + [0] for start in range(20)]
    for name in ("web", "math"):
        write_indexed(folder / name, documents, 91)
    write_indexed(folder / "tiny", [[1, 2, 3]], 91)
    write_indexed(folder / "foreign", [*documents, [95, 0]], 96)
    (folder / "alien").mkdir()
    write_indexed(folder / "alien" / "web", documents, 91)
    for file in pair_files(folder / "alien" / "web"):
        file.touch()
    size = sum(file.stat().st_size for file in pair_files(folder / "alien" / "web"))
    facts = {"bytes": size, "spot": spot_digest(folder / "alien" / "web.idx")}
    manifest = {"sources": {"web": facts}, "tokenizer": {"directory": "tokenizer", "rules": "ed17569f" * 8}}
    (folder / "alien" / "manifest.json").write_text(json.dumps(manifest))
    write_indexed(folder / "alien" / "megatrons_own", documents, 91)
    (folder / "folder" / "prefix.bin").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(91)}, unk_token="w0"))
    words.save(str(folder / "tokenizer" / "tokenizer.json"))


def _checkpoint(directory: Path, config: RunConfig, step: int) -> None:
    temporary = store.begin(directory, step)
    tokens = step * config.tokens_per_step
    facts = {"step": step, "run_tokens": tokens, "tokens": tokens, "config": config.model_dump(mode="json")}
    store.write_facts(temporary, facts)
    store.publish(temporary, directory, step)


WIDE = "model={heads: 12, kv_groups: 4, hidden: 48, ffn: 96}"
MISTAKES = [
    # layout and batch
    (["run.yaml", "parallel.tensor=3"], 2, ["parallel.tensor = 3", "model.heads = 4", "[1, 2, 4]"]),
    (["run.yaml", WIDE, "parallel.tensor=6"], 2, ["parallel.tensor = 6", "model.kv_groups = 4"]),
    (["run.yaml", "parallel.pipeline=3"], 2, ["pipeline x virtual_pipeline = 3", "model.layers = 2", "[1, 2]"]),
    (["run.yaml", "parallel={pipeline: 2, virtual_pipeline: 2}"], 2, ["virtual_pipeline = 4", "model.layers = 2"]),
    (["run.yaml", "batch.micro_batch=3"], 2, ["global_batch = 8", "micro_batch 3", "multiple of 3"]),
    (["run.yaml", "parallel.data=3"], 2, ["global_batch = 8", "data-parallel 3", "multiple of 6"]),
    (["run.yaml", "batch.micro_batch=0"], 2, ["batch.micro_batch = 0", "greater than 0"]),
    (["run.yaml", "parallel.tensor=-2"], 2, ["parallel.tensor = -2", "greater than 0"]),
    (["run.yaml", "parallel.sequence=true"], 2, ["parallel", "needs tensor > 1"]),
    (["run.yaml", "data.sequence_length=65"], 2, ["sequence_length = 65", "max_positions = 64"]),
    # data that does not fit
    (["run.yaml", "data.mixture.web.path=tiny"], 3, ["data.mixture.web (tiny)", "3 tokens", "needs 33"]),
    (["run.yaml", "model.vocabulary=90"], 3, ["tokenizer has 91 entries", "model.vocabulary is 90"]),
    (["run.yaml", "data.mixture.web.path=foreign"], 3, ["data.mixture.web (foreign)", "token 95", "is 91"]),
    (
        ["run.yaml", "data.mixture.web.path=alien/web"],
        3,
        ["data.mixture.web (alien/web)", "alien/tokenizer (SHA-256 ed17569fed17)", "data.tokenizer is tokenizer (SHA-"],
    ),
    (
        ["run.yaml", "validation={every: 5K, windows: 2, sources: {held: alien/web}}"],
        3,
        ["validation.sources.held (alien/web)", "ed17569fed17", "fix: build the data with tokenizer"],
    ),
    (["run.yaml", "data.mixture.web.path=gone"], 3, ["gone.bin does not exist", "octo data build"]),
    (["run.yaml", "data.mixture.web.path=web.bin"], 3, ["web.bin.bin does not exist", "without suffix: web"]),
    (["run.yaml", "data.mixture.web.path=folder/prefix"], 3, ["folder/prefix.bin is not a file"]),
    (["run.yaml", "data.mixture.web.path=web-damaged"], 3, ["web-damaged.idx is damaged"]),
    (["run.yaml", "data.tokenizer=gone"], 3, ["data.tokenizer = gone", "no such directory"]),
    (["run.yaml", "data.tokenizer=a-file"], 3, ["data.tokenizer = a-file", "a file, not a directory"]),
    (["run.yaml", "data.tokenizer=folder"], 3, ["folder/tokenizer.json does not exist"]),
    # weights of the mixture
    (["run.yaml", "data.mixture.web.weight=0"], 2, ["data.mixture.web.weight = 0", "greater than 0"]),
    (["run.yaml", "data.mixture.web.weight=-0.5"], 2, ["data.mixture.web.weight = -0.5", "greater than 0"]),
    (["run.yaml", "data.mixture.web.weight=.nan"], 2, ["data.mixture.web.weight = nan", "finite"]),
    (["run.yaml", "data.mixture.web.weight=.inf"], 2, ["data.mixture.web.weight = inf", "finite"]),
    (["run.yaml", "data.mixture.web.weight=0.5"], 2, ["data.mixture", "to 0.8; scaled", "math: 0.375, web: 0.625"]),
    (["run.yaml", "data.mixture.web.weight=much"], 2, ["data.mixture.web.weight = 'much'", "number"]),
    (["run.yaml", "data.mixture.code.weight=1"], 2, ["'data.mixture.code.path' is missing"]),
    (["run.yaml", "data.mixture.code.path=web"], 2, ["'data.mixture.code.weight' is missing"]),
    (["list.yaml"], 2, ["data.mixture", "a block of names belongs here"]),
    # schedule
    (["run.yaml", "schedule={kind: wsd, decay: 20K}"], 2, ["decay of 20000", "longer than the run's 10000"]),
    (["run.yaml", "schedule={kind: wsd, decay: 9K, warmup: 2K}"], 2, ["decay of 9000", "before the warm-up ends"]),
    (["run.yaml", "schedule.warmup=10K"], 2, ["warmup of 10000", "before the run's 10000"]),
    (["run.yaml", "schedule.tokens=ten"], 2, ["schedule.tokens = 'ten'", "'40K'"]),
    (["run.yaml", "schedule.tokens=0"], 2, ["schedule.tokens = 0", "greater than 0"]),
    (["run.yaml", "schedule.learning_rate=-1"], 2, ["schedule.learning_rate = -1", "greater than 0"]),
    # going on with another run
    (["trained.yaml", "seed=1"], 2, ["trained", "seed: 0 -> 1", "restore"]),
    (["trained.yaml", "data.seed=1"], 2, ["data.seed: 0 -> 1"]),
    (
        ["trained.yaml", "data.mixture.web.weight=0.5", "data.mixture.math.weight=0.5"],
        2,
        ["data.mixture.web.weight: 0.7 -> 0.5"],
    ),
    (["trained.yaml", "data.sequence_length=16"], 2, ["data.sequence_length: 32 -> 16"]),
    (["trained.yaml", "schedule.learning_rate=2.0e-3"], 2, ["0.001", "0.002"]),
    (["trained.yaml", "schedule.kind=cosine"], 2, ["schedule"]),
    (["trained.yaml", "model.ffn=128"], 2, ["model.ffn: 64 -> 128"]),
    (["trained.yaml", "parallel.distributed_optimizer=false"], 2, ["parallel.distributed_optimizer: True -> False"]),
    (["trained.yaml", "dtype=bf16"], 2, ["dtype: 'fp32' -> 'bf16'"]),
    (["pointer.yaml"], 4, ["pointer/latest", "'step_00000099'", "step_00000010, step_00000020", "write one of these"]),
    (["unsealed.yaml"], 4, ["unsealed/checkpoints/step_00000020", "no seal"]),
    # a machine that lacks what is asked for
    (["run.yaml", "fp8={}", "dtype=bf16"], 6, ["fp8", "GPU"]),
    (["run.yaml", "fp8={}"], 2, ["fp8 is set and dtype is fp32", "set dtype to bf16"]),
    (["recipes/runs/llama32_1b_long_16xh100_fp8.yaml"], 6, ["fp8", "GPU"]),
    # files that are none
    (["missing.yaml"], 2, ["missing.yaml: no such file", "recipes/runs/", "check the path"]),
    (["recipes/runs/llama32_3b_stabel_64xh100_fp8.yaml"], 2, ["recipes/runs/llama32_3b_stable_64xh100_fp8.yaml"]),
    (["folder"], 2, ["folder: cannot be read", "readable YAML file"]),
    (["/proc/self/mem"], 2, ["/proc/self/mem: cannot be read", "readable YAML file"]),
    (["a" * 300], 6, ["file name too long"]),
    (["empty.yaml"], 2, ["empty.yaml: is empty"]),
    (["broken.yaml"], 2, ["broken.yaml: not valid YAML"]),
    (["bytes.yaml"], 2, ["bytes.yaml: cannot be read"]),
    (["twice.yaml"], 2, ["twice.yaml", "'seed'", "twice", "line 3"]),
    (["run.yaml", "out=a-file"], 6, ["a-file", "a directory is needed"]),
    # keys and values
    (["typo.yaml"], 2, ["checkpoint.evry", "'every'"]),
    (["run.yaml", "paralel.tensor=2"], 2, ["'paralel'", "'parallel'"]),
    (["run.yaml", "seed"], 2, ["'seed' has no '='", "key.subkey=value"]),
    (["run.yaml", "=3"], 2, ["'=3'", "key.subkey=value"]),
    (["run.yaml", "seed.x=3"], 2, ["seed", "integer"]),
    (["run.yaml", "batch.micro_batch="], 2, ["batch.micro_batch", "integer"]),
    (["run.yaml", "dtype=fp16"], 2, ["dtype = 'fp16'", "'bf16'"]),
    (["run.yaml", "name=my run"], 2, ["name = 'my run'"]),
    (["run.yaml", "start={checkpoint: a, fork: {parent: b}}"], 2, ["either a checkpoint or a fork"]),
    # options
    (["run.yaml", "--until", "garbage"], 2, ["--until", "'garbage'", "'40K'"]),
    (["run.yaml", "--until", "1.5"], 2, ["--until", "'1.5'"]),
    (["run.yaml", "--json"], 2, ["--json", "--dry-run"]),
]


NO_MISTAKE_ON_PAPER = (
    "gone.bin does not exist",
    "web.bin.bin does not exist",
    "data.tokenizer = gone",
    "fp8",
    "--json",
)
"""A dry run may be taken where data and GPUs are not, and prints JSON: first words of what it does not refuse."""
CASES = [("train", *each) for each in MISTAKES]
CASES += [("dry run", *each) for each in MISTAKES if each[2][0] not in NO_MISTAKE_ON_PAPER]


@pytest.mark.parametrize(
    ("how", "arguments", "code", "words"), CASES, ids=[f"{each[0]}: {' '.join(each[1])[:60]}" for each in CASES]
)
def test_a_mistake_is_one_line_with_its_cure(
    octo: Octo, tmp_path: Path, how: str, arguments: list[str], code: int, words: list[str]
) -> None:
    before = _tree(tmp_path)
    found, out, err = octo(*arguments, *(["--dry-run"] if how == "dry run" else []))
    assert found == code and out == "", err
    assert err.startswith("octo: error: ") and err.count("\n") == 1, err
    assert "; fix: " in err or "did you mean" in err, err
    assert [word for word in words if word not in err] == [], err
    assert _tree(tmp_path) == before


def _tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}


def test_a_source_that_repeats_is_named_with_its_count_before_the_run_starts(octo: Octo) -> None:
    """10,000 tokens, 0.7 of them from a source of 620: its 19 windows an epoch are read 11.8 times."""
    code, out, err = octo("run.yaml")
    assert code == 0 and out.endswith("started run.yaml\n")
    assert "octo: sources read more than once: math 5.05 times, web 11.8 times" in err.splitlines()
    assert "more than once" not in octo("run.yaml", "schedule.tokens=500")[2]
    code, out, err = octo("run.yaml", "--dry-run")
    assert code == 0 and err == "" and "sources read more than once: math 5.05 times, web 11.8 times" in out


def test_a_pair_that_no_manifest_names_is_let_through(octo: Octo) -> None:
    assert octo("run.yaml", "data.mixture.web.path=alien/megatrons_own")[0] == 0


def test_a_forecast_of_data_with_another_tokenizer_is_refused(octo: Octo) -> None:
    """Of a run, and of a mixture alone where it names a tokenizer or its sources have two."""
    with pytest.raises(DataError, match=r"alien/web\) was built with .* alien/tokenizer .*data.tokenizer is"):
        forecast_file(Path("run.yaml"), overrides=["data.mixture.web.path=alien/web"])
    mixture = {"web": {"path": "alien/web", "weight": 0.7}, "math": {"path": "math", "weight": 0.3}}
    Path("mixture.yaml").write_text(yaml.safe_dump({"data": {"mixture": mixture}}))
    assert forecast_file(Path("mixture.yaml"), 1000)["windows"]
    with pytest.raises(DataError, match="data.tokenizer is tokenizer"):
        forecast_file(Path("mixture.yaml"), 1000, ["data.tokenizer=tokenizer"])
    shutil.copytree("alien", "second")
    text = Path("second/manifest.json").read_text().replace("ed17569f", "81afae46")
    Path("second/manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"web \(alien/web\) .*ed17569f.* data.mixture.math is of second/tokenizer"):
        forecast_file(Path("mixture.yaml"), 1000, ["data.mixture.math.path=second/web"])


def test_a_pair_that_came_in_the_place_of_a_built_one_is_not_what_the_manifest_speaks_of(octo: Octo) -> None:
    write_indexed(Path("alien/web"), [[number] * 40 for number in range(1, 90)], 91)
    assert octo("run.yaml", "data.mixture.web.path=alien/web")[0] == 0


def test_a_step_longer_than_the_run_is_said(octo: Octo) -> None:
    said = "octo: a step of 8 x 32 = 256 tokens is longer than schedule.tokens = 200: the run is that one step"
    assert said in octo("run.yaml", "schedule.tokens=200")[2].splitlines()
    assert "longer than schedule.tokens" not in octo("run.yaml", "schedule.tokens=256")[2]


def test_a_missing_pointer_beside_checkpoints_is_said_and_the_newest_goes_on(octo: Octo) -> None:
    code, out, err = octo("forgotten.yaml", "schedule.tokens=20K")
    assert code == 0 and out.endswith("started forgotten.yaml schedule.tokens=20K\n")
    line = "octo: forgotten/latest is missing; going on from step_00000020, the newest sealed checkpoint"
    assert line in err.splitlines()
    assert "latest" not in octo("trained.yaml")[2]
    assert "after step 20, from forgotten/checkpoints/step_00000020" in octo("forgotten.yaml", "--dry-run")[1]


def test_another_layout_is_no_mistake(octo: Octo) -> None:
    code, out, _ = octo("trained.yaml", "parallel={tensor: 2, pipeline: 2, sequence: true}")
    assert code == 0 and "started trained.yaml" in out


def test_a_dry_run_as_json_is_json_alone(octo: Octo, tmp_path: Path) -> None:
    before = _tree(tmp_path)
    code, out, err = octo("trained.yaml", "--dry-run", "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["start"].startswith("goes on after step 20")
    assert facts["config"]["model"]["layers"] == 2 and facts["not_checked"][0].startswith("a machine with 1 processes")
    assert [need["scanned"] for need in facts["sources"]] == [True, True]
    assert _tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_this_user_may_not_read(octo: Octo) -> None:
    Path("run.yaml").chmod(0)
    code, _, err = octo("run.yaml")
    assert code == 2 and "run.yaml: cannot be read" in err and err.count("\n") == 1

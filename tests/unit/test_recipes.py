"""The run files that come with the package: complete, explained key by key, and sound to the last parameter."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from megatron_octo.cli.root import app
from megatron_octo.config.data import Corpus, DataBuildConfig, TokenizerConfig, TrainTokenizer
from megatron_octo.config.load import load_config, parse_config, read_yaml
from megatron_octo.config.mixture import DataConfig
from megatron_octo.config.recipes import RECIPES, find_recipe
from megatron_octo.config.run import RunConfig
from megatron_octo.data.clean.questions import KNOWN
from megatron_octo.data.corpora.registry import find_adapter
from megatron_octo.data.engine.build import build_data
from megatron_octo.train.api import load_run
from megatron_octo.train.dry_run import dry_run
from megatron_octo.train.forecast import forecast_file

SIZES = {  # published parameters, learning rate, GPUs
    "llama32_1b": (1_235_814_400, 5e-5, 16),
    "llama32_3b": (3_212_749_824, 2e-5, 64),
    "llama31_8b": (8_030_261_248, 1e-5, 128),
}
STAGES = ["stable", "long", "short", "hybrid", "tool", "open"]
RUNS = [(size, stage) for size in SIZES for stage in STAGES]
LATEST_H100 = 79 * 2**30  # bytes that a card of "80 GB" reports


def file_of(size: str, stage: str) -> Path:
    return Path(f"recipes/runs/{size}_{stage}_{SIZES[size][2]}xh100_fp8.yaml")


def run_of(size: str, stage: str) -> RunConfig:
    return load_run(file_of(size, stage))


def test_no_other_file_is_among_them() -> None:
    assert {path.name for path in (RECIPES / "runs").glob("*.yaml")} == {file_of(*each).name for each in RUNS}


@pytest.mark.parametrize(("size", "stage"), RUNS)
def test_a_dry_run_finds_the_published_model_in_every_run(
    size: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    parameters, _, gpus = SIZES[size]
    facts = dry_run(run_of(size, stage))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "hidden before torch looks for them"
    assert facts["processes"] == gpus
    assert facts["parameters"]["published"] == parameters and facts["parameters"]["padding"] == 0
    assert facts["tokens_per_step"] == 4_194_304
    assert facts["steps"] == (47_684 if stage == "stable" else 4_769)
    assert sum(need["share"] for need in facts["sources"]) == pytest.approx(1)
    assert all(stage["total"] < 0.75 * LATEST_H100 for stage in facts["stages"]), "room for what is not counted"
    start = (
        "start.checkpoint = checkpoints/Llama-3." if stage == "stable" else f"start.fork.parent = runs/{size}_stable"
    )
    assert facts["start"].startswith(start)
    assert "fp8: would need Hopper GPUs and TransformerEngine" in facts["not_checked"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "layout",
    [
        "{tensor: 2, pipeline: 4, data: 2, sequence: true}",
        "{tensor: 8, pipeline: 2, virtual_pipeline: 2, data: 1, sequence: true}",
        "{context: 2, pipeline: 4, data: 2}",
    ],
)
def test_every_parameter_is_counted_once_in_any_layout(size: str, layout: str) -> None:
    """Also the embedding that the last stage holds again where it is tied, and what tensor parallelism repeats."""
    changes = [f"parallel={layout}", "parallel.overlap_param_gather=false", "model.vocabulary=128200"]
    facts = dry_run(load_run(file_of(size, "stable"), changes))
    hidden, tables = facts["config"]["model"]["hidden"], 2 if size == "llama31_8b" else 1
    assert facts["parameters"]["padding"] == 56 * hidden * tables
    assert facts["parameters"]["published"] == SIZES[size][0] - 56 * hidden * tables
    assert len(facts["stages"]) == facts["config"]["parallel"]["pipeline"]


@pytest.mark.parametrize(("size", "stage"), RUNS)
def test_values_of_the_recipe(size: str, stage: str) -> None:
    run, stable = run_of(size, stage), run_of(size, "stable")
    assert run.name == f"{size}_{stage}" and run.out == Path("runs") / run.name
    assert (run.data.sequence_length, run.batch.global_batch, run.dtype) == (8192, 512, "bf16")
    assert run.optimizer.model_dump(exclude={"implementation"}) == {
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "clip": 1.0,
    }  # fmt: skip
    assert (run.schedule.learning_rate, run.schedule.warmup) == (SIZES[size][1], 0)
    if stage == "stable":
        assert (run.schedule.kind, run.schedule.tokens) == ("constant", 200 * 10**9)
        return
    assert (run.schedule.kind, run.schedule.tokens, run.schedule.final_ratio) == ("cosine", 20 * 10**9, 0.1)
    fork = run.start.fork
    assert fork is not None and (fork.parent, fork.at, fork.moments) == (stable.out, 200 * 10**9, True)
    assert run.model == stable.model and run.parallel.processes == stable.parallel.processes


# The paper gives 0.10 to instructions as a whole; it is shared in proportion to 0.01B, 0.29B and 0.51B tokens.
INSTRUCTION = {"tulu_3_personas_if": 0.0012, "wildchat": 0.0358, "ultrachat_200k": 0.0630}
PAPER = {
    "stable": {
        "megamath_web_pro_max": 0.725, "dclm_baseline": 0.10, "megamath_text_code": 0.10, "megamath_qa": 0.05,
        "megamath_code": 0.0125, "megamath_translated_code": 0.0125,
    },
    "long": {
        "megamath_web_pro": 0.55, "dclm_baseline": 0.05, **INSTRUCTION, "openr1_math_220k": 0.15,
        "am_deepseek_distilled_40m": 0.15,
    },
    "short": {
        "megamath_web_pro": 0.55, "dclm_baseline": 0.05, **INSTRUCTION, "megamath_qa": 0.025,
        "openmathinstruct_2": 0.175, "numinamath_1_5": 0.10,
    },
    "hybrid": {
        "megamath_web_pro": 0.55, "dclm_baseline": 0.05, **INSTRUCTION, "openr1_math_220k": 0.10,
        "openmathinstruct_2": 0.10, "numinamath_1_5": 0.10,
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_the_mixtures(stage: str) -> None:
    weights = {name: source.weight for name, source in run_of("llama32_3b", stage).data.mixture.items()}
    assert weights == PAPER.get(stage, weights)
    assert sum(weights.values()) == pytest.approx(1)
    text = (RECIPES / "mixtures" / f"{stage}.yaml").read_text()
    assert ("arXiv:2506.20512" in text) == (stage in PAPER) and ("Our choice" in text) == (stage not in PAPER)


def test_format_against_content() -> None:
    """Two mixtures that differ in how two sources are rendered, and in nothing else."""
    qa, prose = (read_yaml(RECIPES / "mixtures" / f"decay_format_{form}.yaml")["data"] for form in ("qa", "prose"))
    assert str(qa).replace("_qa", "_prose") == str(prose) and qa != prose
    assert [name for name in qa["mixture"] if name not in prose["mixture"]] == [
        "openmathinstruct_2_qa", "numinamath_1_5_qa",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((RECIPES / "mixtures").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_mixture_is_forecast_and_names_corpora_of_the_registry(path: Path) -> None:
    from megatron_octo.data.corpora.registry import ADAPTERS

    found = forecast_file(Path("recipes/mixtures") / path.name, 20 * 10**9)
    assert sum(row["share"] for row in found["sources"]) == pytest.approx(1)
    for name, source in read_yaml(path)["data"]["mixture"].items():
        assert set(source["corpora"]) <= ADAPTERS.keys(), name


def unstated(kind: type[BaseModel], values: dict[str, Any], where: str = "") -> list[str]:
    """Fields that a file leaves to their defaults, but for those that mean "none" or have only one value."""
    found = []
    for name, field in kind.model_fields.items():
        value, arguments = values.get(name), get_args(field.annotation)
        nested = [part for part in (field.annotation, *arguments) if isinstance(part, type(BaseModel))]
        if name not in values:
            found += [] if field.default is None or len(arguments) == 1 else [where + name]
        elif nested and isinstance(value, dict):
            several = value.items() if get_origin(field.annotation) is dict else [(None, value)]
            for key, one in several:
                found += unstated(nested[0], one, f"{where}{name}." + (f"{key}." if key else ""))
    return found


@pytest.mark.parametrize(("size", "stage"), RUNS)
def test_no_default_decides(size: str, stage: str) -> None:
    values = read_yaml(RECIPES / "runs" / file_of(size, stage).name)
    assert unstated(RunConfig, values) == []
    del values["watch"]["sigma"]
    assert unstated(RunConfig, values) == ["watch.sigma"]


PARTS = sorted(path for folder in ("models", "mixtures", "runs") for path in (RECIPES / folder).rglob("*.yaml"))


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_every_key_is_explained(path: Path) -> None:
    """A key that holds a value has a comment on its line or, for a source of a mixture, on the line of its name."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    keys = [line for line in lines if re.match(r"\s*(\w+:\s*\S|- )", line) and not line.startswith("base:")]
    silent = [line for line in keys if " # " not in line and not re.match(r"\s+(path|weight|corpora):|\w+:\s+#", line)]
    assert silent == []
    named = [line for line in lines if re.match(r"    \w+:", line)] if path.parent.name == "mixtures" else []
    assert all(" # " in line for line in named)
    assert "#" not in str(yaml.safe_load(path.read_text())), "a comment that YAML reads as part of a value"
    assert max(map(len, lines)) <= 120


BUILDS = sorted(path for path in (RECIPES / "builds").glob("*.yaml") if path.stem != "minimal")


def made_by_builds() -> dict[Path, Corpus]:
    """Every dataset that the packaged builds make, by its path after the command at the head of their files."""
    made: dict[Path, Corpus] = {}
    for path in BUILDS:
        command = re.search(r"octo data build recipes/builds/(\S+) --out (\S+)", path.read_text())
        assert command and command[1] == path.name and max(map(len, path.read_text().splitlines())) <= 120
        corpora = load_config(DataBuildConfig, path).corpora
        assert not made.keys() & {Path(command[2]) / name for name in corpora}
        made |= {Path(command[2]) / name: corpus for name, corpus in corpora.items()}
    return made


def test_builds_make_every_dataset_that_a_run_or_a_mixture_reads() -> None:
    made = made_by_builds()
    read: dict[Path, list[str] | None] = {}
    for each in RUNS:
        run = run_of(*each)
        assert run.validation is not None
        read |= dict.fromkeys(run.validation.sources.values())
        for _, mixture in run.data.mixtures:
            read |= {source.path: source.corpora for source in mixture.values()}
    for path in (RECIPES / "mixtures").glob("*.yaml"):
        sources = read_yaml(path)["data"]["mixture"].values()
        read |= {Path(source["path"]): source["corpora"] for source in sources}
    # its texts are at Software Heritage; the stable mixture says what replaces it
    assert run_of("llama32_3b", "stable").data.replace == {"megamath_code": "megamath_translated_code"}
    assert read.keys() - made.keys() == {Path("data/megamath_code")} and made.keys() <= read.keys()
    for path in read.keys() & made.keys():
        assert read[path] in (None, [made[path].adapter]), path
        assert made[path].rendering == next(
            (form for form in ("qa", "prose") if path.parent.name.endswith(form)), "published"
        )


def test_what_is_validated_on_is_not_trained_on(tmp_path: Path) -> None:
    """It comes first, so that even a copy of a training file is taken out of training."""
    build = load_config(DataBuildConfig, RECIPES / "builds" / "octothinker.yaml")
    held = [path.name for path in run_of("llama32_3b", "stable").validation.sources.values()]
    assert list(build.corpora)[: len(held)] == held
    assert all(build.corpora[name].tokens == "all" and build.corpora[name].hint for name in held)
    trained_on = held[0].removeprefix("validation_")
    places = {name: {"path": str(tmp_path / name)} for name in (held[0], trained_on)}
    kept = {name: build.corpora[name].model_copy(update=place) for name, place in places.items()}
    for name in kept:
        (tmp_path / name).mkdir()
    held_out = "a page that is held out of training"
    pages = [f"page {number} " + "".join(f"{number * place} " for place in range(2, 30)) for number in range(1, 20)]
    rows = "".join(json.dumps({"text": page}) + "\n" for page in [held_out, *pages])
    (tmp_path / trained_on / "a.jsonl").write_text(rows)
    (tmp_path / held[0] / "b.jsonl").write_text(json.dumps({"text": held_out}) + "\n")
    trained = TokenizerConfig(train=TrainTokenizer(vocabulary_size=300))
    changes = {"corpora": kept, "tokenizer": trained, "decontaminate": None}
    sources = build_data(build.model_copy(update=changes), tmp_path / "out", 1)["sources"]
    assert {name: facts["documents"] for name, facts in sources.items()} == {held[0]: 1, trained_on: 19}


def uncommented(path: Path, first: str, last: str) -> str:
    """A file with the mark of a comment taken away from some of its lines: the first, the last, and those between."""
    lines = path.read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.lstrip().startswith(f"# {first}"))
    end = next(place for place, line in enumerate(lines) if place >= start and last in line)
    return "\n".join(line.replace("# ", "", 1) if start <= place <= end else line for place, line in enumerate(lines))


OFTEN_WANTED = [("corpora: [", "["), ("fields:", "}"), ("gsm8k:", "rendering"), ("mine:", "}"), ("eos_token", ":")]


def test_the_minimal_build_shows_its_keys_and_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = RECIPES / "builds" / "minimal.yaml"
    lines = path.read_text().splitlines()
    silent = [line.strip() for line in lines if re.match(r" *\w+:", line) and " #" not in line]
    assert silent == ["train:", "corpora:", "against:"] and max(map(len, lines)) <= 120
    for first, last in OFTEN_WANTED:
        parse_config(DataBuildConfig, yaml.safe_load(uncommented(path, first, last)), first)
    given = yaml.safe_load(uncommented(path, "path: checkpoints", "path"))
    del given["tokenizer"]["train"]
    assert parse_config(DataBuildConfig, given, "path").tokenizer.path == "checkpoints/tokenizer"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCTO_CORPORA", str(tmp_path))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text("".join(json.dumps({"text": f"page {n % 9}"}) + "\n" for n in range(12)))
    manifest = build_data(load_config(DataBuildConfig, path), tmp_path / "out", 1)
    assert manifest["sources"]["web"]["documents"] == 9
    shown = CliRunner().invoke(app, ["data", "build", "--help"], env={"COLUMNS": "120"}).output
    assert "recipes/builds/minimal.yaml" in shown and find_recipe(Path("recipes/builds/minimal.yaml"), "builds") == path


def test_a_change_of_the_mixture_is_shown() -> None:
    values = yaml.safe_load(uncommented(RECIPES / "mixtures" / "stable.yaml", "phases:", "numinamath_1_5"))
    data = parse_config(DataConfig, {"tokenizer": "t", "sequence_length": 8192, **values["data"]}, "phases")
    (_, before), (window, after) = data.mixtures
    assert (window * 8192 - 150 * 10**9) in range(8192) and after.keys() & before.keys() == {"megamath_web_pro_max"}


def test_budgets_suffice_and_every_corpus_can_be_read() -> None:
    build = load_config(DataBuildConfig, RECIPES / "builds" / "octothinker.yaml")
    for stage in STAGES:
        for name, source in run_of("llama32_3b", stage).data.mixture.items():
            if name == "megamath_code":
                continue
            asked = source.weight * run_of("llama32_3b", stage).schedule.tokens
            budget = build.corpora[name].tokens
            assert budget == "all" or budget >= asked
    for corpus in build.corpora.values():
        assert not find_adapter(corpus.adapter, "adapter").refused
    for path in BUILDS:
        decontaminate = load_config(DataBuildConfig, path).decontaminate
        assert decontaminate is not None and set(decontaminate.against) == set(KNOWN) - {"gpqa"}

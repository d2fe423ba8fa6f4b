from __future__ import annotations

import importlib
import math
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_octo import config
from megatron_octo.config.base import Strict
from megatron_octo.config.check import check_layout, check_run
from megatron_octo.config.data import DataBuildConfig, ProblemSet
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.load import apply_overrides, differences, dump_config, load_config, parse_config
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError
from megatron_octo.units import format_duration, format_tokens, parse_tokens

RUN = {
    "name": "run",
    "out": "runs/run",
    "model": {"layers": 4, "hidden": 64, "heads": 8, "kv_groups": 4, "ffn": 128, "vocabulary": 300},
    "data": {"tokenizer": "tok", "mixture": {"web": {"path": "d/web", "weight": 1}}, "sequence_length": 64},
    "batch": {"global_batch": 8, "micro_batch": 2},
    "schedule": {"learning_rate": 1e-3, "tokens": "10K"},
    "checkpoint": {"every": "5K"},
}


def run(**overrides: object) -> RunConfig:
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return parse_config(RunConfig, apply_overrides(RUN, pairs), "run.yaml")


def test_round_trip(tmp_path: Path) -> None:
    dump_config(run(), tmp_path / "run.yaml")
    assert load_config(RunConfig, tmp_path / "run.yaml") == run()


def test_base_file_lies_under(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "over.yaml").write_text("base: base.yaml\nname: other\nmodel: {layers: 2}\n")
    loaded = load_config(RunConfig, tmp_path / "over.yaml", ["batch.micro_batch=4"])
    assert (loaded.name, loaded.model.layers, loaded.model.hidden, loaded.batch.micro_batch) == ("other", 2, 64, 4)


def test_of_several_bases_the_later_wins_and_the_file_itself_over_all(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "size.yaml").write_text("model: {layers: 2, hidden: 32}\nbatch: {micro_batch: 4}\n")
    (tmp_path / "over.yaml").write_text("base: [run.yaml, size.yaml]\nmodel: {hidden: 128}\n")
    loaded = load_config(RunConfig, tmp_path / "over.yaml")
    assert (loaded.model.layers, loaded.model.hidden, loaded.batch.micro_batch) == (2, 128, 4)


def test_a_base_may_be_a_packaged_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: recipes/runs/llama32_1b_long_16xh100_fp8.yaml\nname: mine\n")
    loaded = load_config(RunConfig, tmp_path / "mine.yaml")
    assert (loaded.name, loaded.model.layers, loaded.parallel.data) == ("mine", 16, 16)
    (tmp_path / "recipes" / "runs").mkdir(parents=True)  # a file of one's own of that name comes first
    (tmp_path / "recipes" / "runs" / "llama32_1b_long_16xh100_fp8.yaml").write_text(yaml.safe_dump(RUN))
    assert load_config(RunConfig, tmp_path / "mine.yaml").model.layers == 4


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("[run.yaml, 3]", ["base = ['run.yaml', 3]", "one YAML file, or a list of them"]),
        ("[]", ["base = []", "a list of them"]),
        ("[run.yaml, over.yaml]", ["base = 'over.yaml' builds on itself"]),
        ("[run.yaml, gone.yaml]", ["gone.yaml: no such file"]),
        ("recipes/../config/run.py", ["config/run.py: no such file"]),
    ],
)
def test_bases_that_are_none(tmp_path: Path, base: str, words: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "over.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, tmp_path / "over.yaml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.layer=3", ["model.layer", "'layers'"]),
        ("mdoel.layers=3", ["mdoel", "'model'"]),
        ("learning_rate=1", ["unknown key 'learning_rate'", "did you mean 'schedule.learning_rate'?"]),
        ("every=5K", ["unknown key 'every'; fix: remove it; the keys there are name, "]),  # two blocks have it
        ("schedule=yes", ["schedule = True; a block of keys belongs here: ", "'schedule: {tokens: ...}'"]),
        ("data.mixture.web.wieght=1", ["wieght", "'weight'"]),
        ("data.mixture.web.weight=0", ["data.mixture.web.weight", "greater than 0"]),
        ("data.mixture.web.weight=.nan", ["weight", "finite"]),
        ("schedule.tokens=ten", ["schedule.tokens", "'ten'", "token count"]),
        ("schedule.warmup=20K", ["warmup of 20000", "10000"]),
        ("parallel.sequence=true", ["tensor > 1"]),
        ("model.heads=7", ["hidden 64", "heads 7"]),
        ("no-equals-sign", ["no-equals-sign", "key.subkey=value"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, words: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, tmp_path / "run.yaml", [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, ["no such file"]), ("a: [1", ["not valid YAML"]), ("- 1", ["mapping"]), (b"\xff\xfe", ["cannot be read"])],
)
def test_bad_files(tmp_path: Path, text: str | bytes | None, words: list[str]) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="run.yaml") as caught:
        load_config(RunConfig, path)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"parallel__tensor": 3}, "model.heads"),
        (
            {"parallel__tensor": 8, "model": "{heads: 24, kv_groups: 12, hidden: 192}"},
            "multiple of model.kv_groups = 12",
        ),
        ({"parallel__pipeline": 3}, "model.layers"),
        ({"parallel__data": 3}, "batch.global_batch"),
        ({"batch__micro_batch": 3}, "batch.global_batch"),
        ({"model__max_positions": 32}, "data.sequence_length"),
        ({"parallel__context": 3}, "data.sequence_length"),
        ({"parallel__tensor": 3, "model": "{heads: 6, kv_groups: 3, ffn: 96, hidden: 96}"}, "multiple of 128 rows"),
        ({"parallel": "{pipeline: 2, virtual_pipeline: 2, data: 4}"}, "1 micro-batches per step is not divisible"),
        ({"parallel": "{data: 2, overlap_param_gather: true}"}, "overlap_param_gather needs parallel.overlap_grad"),
        (
            {"parallel": "{overlap_grad_reduce: true, overlap_param_gather: true, distributed_optimizer: false}"},
            "overlap_param_gather needs parallel.distributed_optimizer",
        ),
        ({"parallel": "{tensor: 2, tp_comm_overlap: true}"}, "tensor = 2, parallel.sequence = false"),
        ({"parallel": "{tp_comm_overlap: true}"}, "tensor = 1"),
        (
            {"parallel": "{tensor: 2, sequence: true, tp_comm_overlap: true}", "transformer_impl": "local"},
            "transformer_impl = local",
        ),
        ({"recompute": "{kind: selective, layers: 2}"}, "recompute.layers = 2 with recompute.kind = selective"),
        ({"recompute": "{method: block}"}, "recompute.method = block with recompute.kind = none"),
        ({"recompute": "{kind: full, layers: 5}"}, "more than the 4 layers"),
        ({"recompute": "{kind: full, method: block, layers: 3}", "parallel__pipeline": 2}, "more than the 2 layers"),
        ({"recompute": "{kind: full, layers: 3}"}, "does not divide the 4 layers"),
    ],
)
def test_cross_field_rules(overrides: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        check_run(run(**overrides))


def test_good_layouts_pass() -> None:
    check_run(run(parallel__tensor=2, parallel__pipeline=2, parallel__sequence="true"))
    check_run(run(parallel__context=2))
    check_run(run(parallel__tensor=8))  # two ranks share a KV group
    check_run(run(parallel__tensor=2, model__kv_groups=1))
    check_run(run(parallel="{data: 2, overlap_grad_reduce: true, overlap_param_gather: true}"))
    check_run(run(parallel="{tensor: 2, sequence: true, tp_comm_overlap: true}"))
    check_run(run(recompute="{kind: full, method: block, layers: 3}"))
    check_run(run(recompute="{kind: full, layers: 2}", parallel__pipeline=2))
    check_run(run(recompute="{kind: selective}"))
    assert run(parallel__tensor=2, parallel__pipeline=2, parallel__sequence="true").parallel.label == "TP2 PP2 SP"


def _fields() -> list[tuple[type[Strict], str, Any]]:
    """Every field of every configuration class there is."""
    for module in pkgutil.iter_modules(config.__path__):
        importlib.import_module(f"megatron_octo.config.{module.name}")
    kinds, found = [Strict], []
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found += [(kind, name, field.annotation) for name, field in kind.model_fields.items()]
    return found


def _complaints(kind: type[Strict], name: str, value: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({name: value, "no such key": 0})
    return [error["type"] for error in caught.value.errors() if error["loc"][:1] == (name,)]


def _holds(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_holds(inner, kind) for inner in getattr(annotation, "__args__", ()))


def test_no_number_of_any_configuration_may_be_infinite_or_a_yes() -> None:
    fields = [field for field in _fields() if _holds(field[2], float) or _holds(field[2], int)]
    plain = [field for field in fields if not _holds(field[2], dict) and "dict" not in str(field[2])]
    assert len(plain) > 60
    for kind, name, annotation in plain:
        if _holds(annotation, float):
            for value in (math.inf, math.nan):
                assert _complaints(kind, name, value), f"{kind.__name__}.{name} takes {value}"
        if not _holds(annotation, bool):
            assert _complaints(kind, name, True), f"{kind.__name__}.{name} takes true"


def test_every_mistake_of_a_file_is_shown_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    wrong = ["sed=1", "model.layers=20K", "batch.micro_batch=0", "optimizer.clip=.inf", "checkpoint.every=often"]
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, tmp_path / "run.yaml", wrong)
    first, *each = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'run.yaml'}: 5 mistakes:"
    assert each[0] == "  - unknown key 'sed'; fix: did you mean 'seed'?"
    assert (
        "  - model.layers = '20K'; it must be an integer; fix: only counts of tokens take a suffix: write 20000" in each
    )
    assert len(each) == 5 and all("; fix: " in line for line in each)


def test_a_choice_of_types_is_one_mistake() -> None:
    with pytest.raises(ConfigError, match="^test: count") as caught:
        parse_config(ProblemSet, {"count": "many"}, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"corpora": {"c": {"tokens": "20X"}}},
            "corpora.c.tokens = '20X'; '20X' is not a token count; write an integer",
        ),
        ({"corpora": {"c": {"tokens": "20X"}}}, "fix: change 'corpora.c.tokens', or write 'all'"),
        ({"corpora": {"c": {"tokens": -5}}}, "a token count cannot be negative; fix: change 'corpora.c.tokens', or"),
        ({"deduplicate": True}, "belongs here: exact, partitions, near; fix: write 'deduplicate: {}', which takes the"),
        ({"deduplicate": {"near": True}}, "hashes_per_bucket, seed; fix: write 'near: {}', which takes the defaults"),
        ({"deduplicate": False}, "near; fix: leave it out"),
        ({"tokenizer": "foo"}, "a block of keys belongs here: train, path; fix: write 'tokenizer: {path: foo}'"),
        (
            {"tokenizer": True},
            "tokenizer = True; a block of keys belongs here: train, path; fix: write 'tokenizer: {",
        ),
        ({"decontaminate": {"against": {"a": "F"}}}, "against.a = 'F'; a block of keys belongs here: path, like"),
        ({"decontaminate": {"against": {"a": "F"}}}, "fix: write 'a: {path: F}'"),
        ({"corpora": ["x"]}, "corpora; a block of names belongs here, each with keys of adapter, path"),
        ({"world": {"tokens": "1K"}}, "world.tokens = '1K'; a block of names belongs here; fix: write 'tokens:' and"),
        ({"world": {"tokens": {"wib": 1}}}, "unknown key 'world.tokens.wib'; fix: the keys there are 'web', 'short_c"),
        ({"foo": 3}, "unknown key 'foo'; fix: remove it; the keys there are seed, world, corpora"),
        ({"vocabulary_size": 3}, "unknown key 'vocabulary_size'; fix: remove it; the keys there are seed"),
        ({"tokenizer": {"vocabulary_size": 3}}, "'tokenizer.vocabulary_size'; fix: did you mean 'train.vocabulary_si"),
        (
            {"index": {"foo": 3}},
            "unknown key 'index.foo'; fix: remove it; the keys there are eos, eos_token, bos",
        ),
        ({"tokenizer": None}, "fix: write 'tokenizer: {train: ...}' or 'tokenizer: {path: ...}'"),
        ({3: 3}, "unknown key '3'; keys are words; fix: remove it; the keys there are seed"),
        ({"path": "x"}, "unknown key 'path'; fix: remove it"),  # more than one block has it
    ],
)
def test_a_mistake_in_a_build_file_is_told_in_the_keys_of_the_file(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(DataBuildConfig, {"tokenizer": {"path": "t"}, "corpora": {"c": {}}} | values, "b.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_yaml_mistakes_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {layers: 2")
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_config(RunConfig, tmp_path / "run.yaml")
    assert "unicode string" not in str(caught.value) and "line 1" in str(caught.value)


def test_steps_round_up() -> None:
    assert run().tokens_per_step == 512
    assert run().steps == 20


def test_rope_scaling_that_megatron_cannot_express_is_refused() -> None:
    with pytest.raises(ConfigError, match="low_freq_factor"):
        values = {**RUN["model"], "rope_scaling": {"factor": 8, "low_freq_factor": 2.0}}
        parse_config(ModelConfig, values, "model")


def test_differences_name_fields() -> None:
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
    assert differences(old, new) == ["a.c: 2 -> 3", "d: None -> 4"]


def test_token_counts() -> None:
    assert [parse_tokens(text) for text in ("20B", "1.5M", "40k", "1_000", 7)] == [
        20 * 10**9,
        1_500_000,
        40_000,
        1000,
        7,
    ]
    for bad in ("1.5", "-3", "x", True, -1, 1.5):
        with pytest.raises(ValueError):
            parse_tokens(bad)
    assert [format_tokens(count) for count in (999, 1_048_576, 20 * 10**9)] == ["999", "1.05M", "20B"]
    assert [format_tokens(count) for count in (999_997_440, 999_999, 999_400)] == ["1B", "1M", "999K"]
    assert [format_tokens(count) for count in (0, 5_000 * 10**12)] == ["0", "5000T"]
    assert [format_duration(seconds) for seconds in (5, 75, 5400)] == ["5s", "1m15s", "1h30m"]


def test_keys_and_values_that_cannot_be_shared_equally() -> None:
    with pytest.raises(ConfigError, match="the 4 rows of keys and values"):
        check_layout(run(model__hidden=16, model__kv_groups=1).model, ParallelConfig(tensor=8))
    check_layout(run(model__hidden=32, model__kv_groups=1).model, ParallelConfig(tensor=8))

"""A conversion is the model it was, and says so when it is not: round trips, logits, and planted faults."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from convert_models import LLAMA3, VOCABULARY, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_octo.checkpoint.dist import iterate_tensors, write_model
from megatron_octo.checkpoint.seal import seal
from megatron_octo.checkpoint.sharded import save_state
from megatron_octo.checkpoint.store import write_facts
from megatron_octo.config.run import ModelConfig, ParallelConfig
from megatron_octo.convert import forward, hf_io
from megatron_octo.convert.api import from_hf, to_hf, to_hf_many
from megatron_octo.convert.certificate import certify, examine, explain, require_valid, verify, write_certificate
from megatron_octo.convert.checks import check_logits, check_rope
from megatron_octo.convert.forward import single_process
from megatron_octo.convert.megatron_io import CheckpointTensors, read_origin
from megatron_octo.convert.rules import FusedQKV, GatedPair
from megatron_octo.errors import CertificateError, CheckpointError, ConfigError, DataError
from megatron_octo.model.build import build_gpt
from megatron_octo.model.hugging_face import to_hf_config

pytestmark = pytest.mark.timeout(120)

KINDS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 8},
    "bf16": {"dtype": torch.bfloat16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


class World:
    """One model of each kind: as Hugging Face directory, as checkpoint, and as certified export."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = write_tokenizer(root / "tokenizer")
        for kind, changes in KINDS.items():
            write_llama(root / kind / "hf", self.tokenizer, **changes)
            from_hf(root / kind / "hf", root / kind / "checkpoint")
        pairs = [(root / kind / "checkpoint", root / kind / "out") for kind in KINDS]
        self.certificates = dict(zip(KINDS, to_hf_many(pairs), strict=True))

    def copy_of_export(self, kind: str, target: Path) -> Path:
        return Path(shutil.copytree(self.root / kind / "out", target))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module", autouse=True)
def _one_world_for_all() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with single_process():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_LONGEST", 128)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one
    )


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bitwise(world: World, kind: str) -> None:
    certificate = world.certificates[kind]
    assert certificate["valid"] is True
    assert _same(_weights(world.root / kind / "hf"), _weights(world.root / kind / "out"))
    assert certificate["coverage"]["tensors"] == certificate["coverage"]["covered"] == 29 + (kind == "untied")
    assert certificate["round_trip"]["bitwise"] is True
    assert certificate["vocabulary"]["padding_rows"] == 72
    assert certificate["logits"]["max_abs_difference"] < 1e-5
    assert certificate["logits"]["greedy_match"] == 1.0
    assert certificate["logits"]["prompt_lengths"] == [1, 7, 33, 128, 2048]
    assert certificate["tied_head"]["tied"] is (kind != "untied")
    assert certificate["dtype"]["export"] == ("bfloat16" if kind == "bf16" else "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_export_as_it_loads_the_source(world: World, kind: str) -> None:
    source, out = world.root / kind / "hf", world.root / kind / "out"
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (source, out))
    assert after.dtype == before.dtype
    prompt = torch.arange(40)[None] * 7 % VOCABULARY
    with torch.no_grad():
        assert torch.equal(before(prompt).logits, after(prompt).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == after.config.eos_token_id == after.generation_config.eos_token_id == 2
    assert tokenizer.decode(tokenizer.encode("Question: 12")) == "Question: 12"


def test_config_is_spelled_for_both_majors_of_transformers(world: World) -> None:
    values = json.loads((world.root / "tied" / "out" / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == LLAMA3["rope_theta"]
    assert values["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert values["rope_parameters"] == LLAMA3
    assert values["torch_dtype"] == values["dtype"] == "float32"


def test_a_checkpoint_saved_by_megatron_comes_back_bitwise(world: World, tmp_path: Path) -> None:
    """Megatron -> Hugging Face -> Megatron, with rows of padding that training left non-zero."""
    values = {
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_groups": 2,
        "ffn": 48,
        "vocabulary": VOCABULARY,
        "max_positions": 64,
    }
    model = ModelConfig(**values, tied_embeddings=False)
    gpt = build_gpt(model, ParallelConfig(), "fp32", pre_process=True, post_process=True, seed=5)
    with torch.no_grad():
        gpt.embedding.word_embeddings.weight[VOCABULARY:] = 1.5
        gpt.decoder.final_layernorm.weight.normal_(1, 0.2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    save_state(checkpoint, [gpt], None)
    config = {"name": "long", "model": model.model_dump(mode="json"), "data": {"tokenizer": str(world.tokenizer)}}
    write_facts(
        checkpoint, {"step": 3, "run_tokens": 30, "tokens": 130, "config": config, "lineage": {"parent": "stable"}}
    )
    seal(checkpoint)
    (tmp_path / "run" / "latest").write_text(checkpoint.name)

    certificate = to_hf(tmp_path / "run", tmp_path / "hf")
    assert certificate["valid"] is True
    assert certificate["vocabulary"]["padding_is_zero"] is False
    lineage = certificate["lineage"]
    assert (lineage["run"], lineage["step"], lineage["tokens"]) == ("long", 3, 130)
    assert lineage["lineage"] == {"parent": "stable"}
    assert _weights(tmp_path / "hf")["model.embed_tokens.weight"].shape == (VOCABULARY, 32)

    from_hf(tmp_path / "hf", tmp_path / "again")
    first, second = dict(iterate_tensors(checkpoint)), dict(iterate_tensors(tmp_path / "again"))
    first["embedding.word_embeddings.weight"][VOCABULARY:] = 0
    assert _same(first, second)


def test_export_in_another_dtype_and_in_shards(world: World, tmp_path: Path) -> None:
    certificate = to_hf(world.root / "tied" / "checkpoint", tmp_path / "out", dtype="bf16", shard_bytes=100_000)
    assert certificate["dtype"] == {"checkpoint": "float32", "export": "bfloat16"}
    assert sum(name.endswith(".safetensors") for name in certificate["files"]) > 2
    assert verify(tmp_path / "out")["valid"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    original = _weights(world.root / "tied" / "hf")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, original.to(torch.bfloat16))


@pytest.mark.parametrize(("factor", "dim", "theta"), [(8.0, 128, 500000.0), (32.0, 64, 500000.0), (None, 128, 10000.0)])
def test_rope_tables_agree_at_the_published_sizes(factor: float | None, dim: int, theta: float) -> None:
    """Llama 3.1 8B, Llama 3.2 1B and Llama 2 frequencies, up to position 131072."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": theta, "rope_scaling": {"factor": factor} if factor else None}
    model = ModelConfig(layers=1, hidden=2 * dim, heads=2, kv_groups=1, ffn=8, vocabulary=10, **rope)
    config = LlamaConfig(**to_hf_config(model, "fp32"))
    ours = RotaryEmbedding(dim, 1.0, rotary_base=theta, rope_scaling=bool(factor), rope_scaling_factor=factor or 1.0)
    facts = check_rope(ours.inv_freq.cpu(), LlamaRotaryEmbedding(config).inv_freq, model)
    assert facts["passed"], facts
    assert facts["at_position"] == 131072


def _outputs(*logits: list[float]) -> forward.Outputs:
    return forward.Outputs([torch.tensor([row]) for row in logits], torch.ones(1))


def test_each_measure_of_the_logits_refuses_by_itself() -> None:
    same = check_logits(_outputs([9.0, 1.0]), _outputs([9.0, 1.0]), [[0]])
    assert same["passed"] and same["kl"] == 0 and same["greedy_match"] == 1
    assert not check_logits(_outputs([9.0, 1.0]), _outputs([9.0, 1.1]), [[0]])["passed"]
    # One large logit makes the tolerance wide; the distribution over the others still shows the difference.
    far = check_logits(_outputs([-1e5, 1.0, 0.0]), _outputs([-1e5, 1.5, 0.0]), [[0]])
    assert far["max_abs_difference"] < far["tolerance"] and far["kl"] > 1e-3 and not far["passed"]
    nan = check_logits(_outputs([9.0, 1.0], [1.0, 2.0]), _outputs([9.0, 1.0], [math.nan, 2.0]), [[0], [0]])
    assert not nan["passed"]


def test_a_checkpoint_of_other_shapes_is_not_loaded(world: World) -> None:
    origin = read_origin(world.root / "tied" / "checkpoint")
    narrow = origin.model.model_copy(update={"ffn": origin.model.ffn // 2})
    deeper = origin.model.model_copy(update={"layers": origin.model.layers + 1})
    for model, message in ((narrow, "linear_fc1.weight has shape"), (deeper, "is missing")):
        with pytest.raises(CheckpointError, match=message):
            forward.megatron_outputs(model, CheckpointTensors(origin.checkpoint), [[1, 2]])


# --- faults planted in written files: the certificate must name each


def _swap(one: str, other: str) -> Callable[[dict], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return change


def _permute_groups(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])


def _leave_padding(tensors: dict[str, torch.Tensor]) -> None:
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, torch.zeros(72, rows.shape[1])])


def _drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        del tensors[name]


def _touch(name: str, value: float = 1e-3) -> Callable[[dict], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] += value

    return change


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.0.mlp"
WEIGHT_FAULTS = {
    "q and k swapped": (
        "untied", _swap(f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.k_proj.weight"), {"round_trip", "logits"}, QKV,
    ),
    "KV groups permuted": ("tied", _permute_groups, {"round_trip", "logits"}, QKV),
    "gate and up swapped": (
        "tied", _swap(f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"), {"round_trip", "logits"},
        "decoder.layers.0.mlp.linear_fc1.weight",
    ),
    "padded rows left in": (
        "tied", _leave_padding, {"coverage", "round_trip", "rope", "logits"},
        "model.embed_tokens.weight [384, 64] instead of [312, 64]",
    ),
    "dropped layer": (
        "tied", _drop_layer, {"coverage", "round_trip", "rope", "logits"}, "missing model.layers.2.input_layernorm",
    ),
    "untied head changed": ("untied", _touch("lm_head.weight"), {"round_trip", "logits"}, "output_layer.weight"),
    "last bit of a norm": ("tied", _touch("model.norm.weight", 2e-7), {"round_trip"}, "decoder.final_layernorm"),
    "not a number": (
        "tied", _touch("model.norm.weight", math.nan), {"round_trip", "logits"}, "not_finite decoder.final_layernorm",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_a_fault_in_the_weights_is_named(world: World, tmp_path: Path, fault: str) -> None:
    kind, change, failed, named = WEIGHT_FAULTS[fault]
    directory = world.copy_of_export(kind, tmp_path / "out")
    tensors = _weights(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    certificate = certify(read_origin(world.root / kind / "checkpoint"), directory, None)
    assert certificate["valid"] is False
    assert set(certificate["failed"]) == failed
    assert named in "; ".join(explain(certificate))


def _set(**values: object) -> Callable[[dict], None]:
    return lambda config: config.update(values)


def _set_rope(key: str, value: float) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        for spelling in (config, config["rope_scaling"], config["rope_parameters"]):
            if key in spelling:
                spelling[key] = value

    return change


CONFIG_FAULTS = {
    "rope theta": (_set_rope("rope_theta", 400000.0), {"config", "rope", "logits"}, "rope_theta: 500000.0 -> 400000.0"),
    "rope factor": (_set_rope("factor", 32.0), {"config", "rope"}, "rope_scaling.factor: 8.0 -> 32.0"),
    "norm epsilon": (_set(rms_norm_eps=1e-6), {"config"}, "norm_epsilon: 1e-05 -> 1e-06"),
    "positions": (_set(max_position_embeddings=8192), {"config"}, "max_positions: 16384 -> 8192"),
    "tie flag": (_set(tie_word_embeddings=False), {"config", "tied_head", "logits"}, "tied_embeddings: True -> False"),
    "end of text": (_set(eos_token_id=1), {"end_of_text"}, "config 1"),
    "another family": (_set(model_type="mamba"), {"config"}, "model_type = 'mamba'"),
}


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_fault_in_the_configuration_is_named(world: World, tmp_path: Path, fault: str) -> None:
    change, failed, named = CONFIG_FAULTS[fault]
    directory = world.copy_of_export("tied", tmp_path / "out")
    values = json.loads((directory / "config.json").read_text())
    change(values)
    (directory / "config.json").write_text(json.dumps(values))
    certificate = certify(read_origin(world.root / "tied" / "checkpoint"), directory, None)
    assert failed <= set(certificate["failed"]), certificate["failed"]
    assert named in "; ".join(explain(certificate))
    # After certification: RL refuses the file, verify names the field without checkpoint or trainer.
    with pytest.raises(CertificateError, match="config.json: changed since it was certified"):
        require_valid(directory)
    problems = "; ".join(examine(directory)["problems"])
    assert "config.json: changed" in problems
    assert named in problems


# --- faults in the rules themselves: both directions agree with each other, so only the forward pass can tell


def _naive_fused(self: FusedQKV, tensors, size) -> torch.Tensor:
    return torch.cat(tuple(tensors))


def _naive_split(self: FusedQKV, tensor, size) -> tuple[torch.Tensor, ...]:
    return tensor.split((size.attention, size.groups * size.dim, size.groups * size.dim))


def _reordered(method: Callable, order: tuple[int, ...], *, before: bool) -> Callable:
    def call(self, given, size):
        return (
            method(self, [given[i] for i in order], size)
            if before
            else tuple(method(self, given, size)[i] for i in order)
        )

    return call


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("fault", ["q and k swapped", "no KV groups", "gate and up swapped"])
def test_a_wrong_rule_is_caught_by_the_logits_and_leaves_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    kind = "untied" if fault == "q and k swapped" else "tied"
    wrong = {
        "q and k swapped": (FusedQKV, (1, 0, 2)),
        "gate and up swapped": (GatedPair, (1, 0)),
    }
    if fault in wrong:
        rule, order = wrong[fault]
        importing, exporting = rule.import_, rule.export
        monkeypatch.setattr(rule, "import_", _reordered(importing, order, before=True))
        monkeypatch.setattr(rule, "export", _reordered(exporting, order, before=False))
    else:
        monkeypatch.setattr(FusedQKV, "import_", _naive_fused)
        monkeypatch.setattr(FusedQKV, "export", _naive_split)
    with pytest.raises(CertificateError, match="did not prove itself: logits: max_abs_difference"):
        to_hf(world.root / kind / "checkpoint", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- certificates


def test_a_certified_directory_passes_and_verifies(world: World) -> None:
    certificate = require_valid(world.root / "untied" / "out")
    assert certificate == world.certificates["untied"]
    assert set(certificate["files"]) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    report = verify(world.root / "untied" / "out")
    assert report["valid"] is True
    assert report["logits"]["max_abs_difference"] < 1e-5


def _flip_a_byte(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


def _edit(**values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "certificate.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


ALTERATIONS = {
    "a changed byte": (_flip_a_byte, "model.safetensors: changed since it was certified"),
    "a missing file": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "an added file": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "adapter_config.json: not in the certificate",
    ),
    "no certificate": (lambda d: (d / "certificate.json").unlink(), "certificate.json: missing"),
    "an edited certificate": (_edit(valid=True, failed=["logits"]), "self_sha256 does not fit its content"),
    "half a certificate": (lambda d: (d / "certificate.json").write_text('{"valid": tr'), "not readable as JSON"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_directory_is_refused(world: World, tmp_path: Path, alteration: str) -> None:
    change, message = ALTERATIONS[alteration]
    directory = world.copy_of_export("tied", tmp_path / "out")
    change(directory)
    with pytest.raises(CertificateError, match=message):
        require_valid(directory)
    with pytest.raises(CertificateError, match=message):
        verify(directory)


@pytest.mark.usefixtures("short_prompts")
def test_an_honest_but_invalid_certificate_is_refused(world: World, tmp_path: Path) -> None:
    directory = world.copy_of_export("tied", tmp_path / "out")
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    certificate = certify(read_origin(world.root / "tied" / "checkpoint"), directory, None)
    write_certificate(directory, certificate)
    with pytest.raises(CertificateError, match="valid is false, failed: end_of_text"):
        require_valid(directory)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    facts = copy.deepcopy(read_origin(world.root / "tied" / "checkpoint").facts)
    facts["model"]["vocabulary"] = 260  # rows 260 to 279 have tokens, and would be cut
    tensors = dict(iterate_tensors(world.root / "tied" / "checkpoint"))
    write_model(tmp_path / "small", tensors.items(), {"model": facts["model"], "tokenizer": facts["tokenizer"]})
    with pytest.raises(CertificateError, match="vocabulary: published 260, tokenizer 280"):
        to_hf(tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _tokenizer_with(world: World, target: Path, change: Callable[[dict, dict], None]) -> Path:
    shutil.copytree(world.tokenizer, target)
    files = [target / "tokenizer.json", target / "tokenizer_config.json"]
    core, settings = (json.loads(path.read_text()) for path in files)
    change(core, settings)
    for path, values in zip(files, (core, settings), strict=True):
        path.write_text(json.dumps(values))
    return target


def _swap_two_tokens(core: dict, settings: dict) -> None:
    vocabulary = core["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("fault", ["ids", "end of text"])
def test_another_tokenizer_than_trainings_is_refused(world: World, tmp_path: Path, fault: str) -> None:
    """Weights, logits and vocabulary size are all right: only the tokenizer's own files can tell."""
    if fault == "ids":
        change, named = _swap_two_tokens, "tokenizer: different tokenizer.json"
    else:
        change, named = (lambda core, settings: settings.update(eos_token="a")), "tokenizer: .*trained': 2"
    tokenizer = _tokenizer_with(world, tmp_path / "tokenizer", change)
    with pytest.raises(CertificateError, match=named):
        to_hf(world.root / "tied" / "checkpoint", tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_tokenizer_serves(world: World, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(world.root / "tied" / "hf", tmp_path / "copied"))
    directory = world.copy_of_export("tied", tmp_path / "out")
    assert to_hf(world.root / "tied" / "checkpoint", directory, tokenizer=copied) == world.certificates["tied"]
    assert world.certificates["tied"]["tokenizer"]["compared"] is True


def test_a_tokenizer_with_code_of_its_own_is_refused(world: World, tmp_path: Path) -> None:
    tokenizer = _tokenizer_with(
        world, tmp_path / "tokenizer", lambda _, settings: settings.update(auto_map={"AutoTokenizer": "a/b--evil.T"})
    )
    with pytest.raises(DataError, match="auto_map"):
        to_hf(world.root / "tied" / "checkpoint", tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_kept_if_identical_and_refused_otherwise(world: World, tmp_path: Path) -> None:
    checkpoint = world.root / "tied" / "checkpoint"
    directory = world.copy_of_export("tied", tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert to_hf_many([(checkpoint, directory)]) == [world.certificates["tied"]]
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    for other in (world.root / "untied" / "checkpoint", checkpoint):
        with pytest.raises(ConfigError, match="out: already exists"):
            to_hf(other, directory, dtype="bf16" if other == checkpoint else "source")
    talking = _tokenizer_with(world, tmp_path / "talking", lambda _, settings: settings.update(chat_template="{{ x }}"))
    with pytest.raises(ConfigError, match="out: already exists"):
        to_hf(checkpoint, directory, tokenizer=talking)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match="out: already exists"):
        to_hf(checkpoint, directory)


def test_the_three_files_that_state_an_end_of_text_agree(world: World) -> None:
    facts = hf_io.end_of_text(world.root / "tied" / "out")
    assert facts == {"tokenizer": 2, "config": 2, "generation_config": 2, "agree": True}

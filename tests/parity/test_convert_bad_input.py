"""What a conversion refuses: one clear line each, and not a file of it left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_models import LLAMA3, VOCABULARY, write_hf, write_tokenizer
from safetensors.torch import load_file, save_file

from megatron_octo.checkpoint.dist import TorchDist
from megatron_octo.checkpoint.dist_write import write_model
from megatron_octo.checkpoint.seal import SEAL, seal
from megatron_octo.checkpoint.store import read_facts
from megatron_octo.checkpoint.tensors import TensorSource, read
from megatron_octo.convert.api import from_hf, to_hf, to_hf_many
from megatron_octo.convert.compare import diff
from megatron_octo.convert.derive import Selected
from megatron_octo.errors import CertificateError, CheckpointError, ConfigError, DataError, OctoError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE, KEY = "model.layers.1.mlp.gate_proj.weight", "model.layers.0.self_attn.k_proj.weight"
LITTLE = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a model in two shards `shards`, and its `checkpoint`."""
    root = tmp_path_factory.mktemp("made")
    write_hf(root / "hf", write_tokenizer(root / "tokenizer"), **LITTLE)
    from_hf(root / "hf", root / "checkpoint")
    shutil.copytree(root / "hf", root / "shards")
    tensors = load_file(root / "hf" / WEIGHTS)
    (root / "shards" / WEIGHTS).unlink()
    index = {}
    for number in (1, 2):
        name = f"model-{number:05d}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number - 1 :: 2]}
        save_file(part, root / "shards" / name)
        index.update(dict.fromkeys(part, name))
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return root


def _refused(call: Callable[[], object], error: type[OctoError], message: str, parent: Path) -> None:
    before = sorted(path.relative_to(parent) for path in parent.rglob("*"))
    with pytest.raises(error, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert sorted(path.relative_to(parent) for path in parent.rglob("*")) == before


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return apply


def _json(name: str, **values: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, **values}))

    return apply


def _without(name: str, key: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        del content[key]
        (directory / name).write_text(json.dumps(content))

    return apply


def _header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Rewrite the header of the weights, its tensors' bytes left as they are."""

    def apply(directory: Path) -> None:
        content = (directory / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def _bytes(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes())) and None


def _overlapping(header: dict) -> None:
    header[GATE]["data_offsets"] = [at - 64 for at in header[GATE]["data_offsets"]]


def _point(to: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        listed = json.loads(path.read_text())["weight_map"]
        path.write_text(json.dumps({"weight_map": {**listed, GATE: to}}))

    return apply


def _pickled(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def _padded(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.zeros(384 - VOCABULARY, tensors[EMBEDDING].shape[1])])


SOURCE_FAULTS: dict[str, tuple[str, Callable[[Path], object], type[OctoError], str]] = {
    "a tied head of its own": (
        "hf", _tensors(lambda t: t.update({HEAD: t[EMBEDDING] + 1})), DataError, f"{HEAD} differs from {EMBEDDING}",
    ),
    "an untied head that is missing": ("hf", _json(CONFIG, tie_word_embeddings=False), DataError, f"missing {HEAD}"),
    "yarn": (
        "hf", _json(CONFIG, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), ConfigError,
        "yarn",
    ),
    "frequencies of another scaling": (
        "hf", _json(CONFIG, rope_parameters={**LLAMA3, "low_freq_factor": 2.0}), ConfigError, "low_freq_factor",
    ),
    "padding left in": (
        "hf", _tensors(_padded), DataError, rf"misshapen {EMBEDDING} \[384, 32\] instead of \[312, 32\]",
    ),
    "a missing tensor": ("hf", _tensors(lambda t: t.pop(GATE)), DataError, f"missing {GATE}"),
    "an extra tensor": ("hf", _tensors(lambda t: t.update(ghost=torch.ones(2))), DataError, "extra ghost"),
    "a dropped layer": (
        "hf", _tensors(lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n]), DataError, "missing model.layers.1",
    ),
    "another shape": (
        "hf", _tensors(lambda t: t.update({GATE: t[GATE][:-1].clone()})), DataError, rf"misshapen {GATE} \[47, 32\]",
    ),
    "a dtype of no weights": ("hf", _tensors(lambda t: t.update({KEY: t[KEY].to(torch.int8)})), DataError, "'I8'"),
    "two dtypes in one tensor": ("hf", _tensors(lambda t: t.update({KEY: t[KEY].half()})), DataError, "has one dtype"),
    "pickled weights": ("hf", _pickled, DataError, r"pickled weights \(pytorch_model.bin\)"),
    "an index that names a missing file": (
        "shards", lambda d: (d / "model-00002-of-00002.safetensors").unlink(), DataError,
        "00002-of-00002.safetensors: missing",
    ),
    "an index that leads out": ("shards", _point("../hf/model.safetensors"), DataError, "lie beside their index"),
    "an index that places wrongly": (
        "shards", _point("model-00009-of-00002.safetensors"), DataError, "00009-of-00002|does not place",
    ),
    "an index without a map": (
        "shards", lambda d: (d / "model.safetensors.index.json").write_text("{}"), DataError, "no weight_map",
    ),
    "a header longer than the file": (
        "hf", _bytes(lambda b: struct.pack("<Q", 1 << 40) + b[8:]), DataError, "a header of 1099511627776 bytes",
    ),
    "a header that is not JSON": ("hf", _bytes(lambda b: b[:8] + b"\xff" * 64 + b[72:]), DataError, "not JSON"),
    "overlapping tensors": ("hf", _header(_overlapping), DataError, "overlaps|hole"),
    "a file cut short": ("hf", _bytes(lambda b: b[:-100]), DataError, "ends at byte"),
    "trailing bytes": ("hf", _bytes(lambda b: b + b"more"), DataError, "ends at byte"),
    "an empty file": ("hf", _bytes(lambda b: b""), DataError, "not a safetensors file"),
    "no configuration": ("hf", lambda d: (d / CONFIG).unlink(), DataError, "config.json: missing"),
    "half a configuration": ("hf", _bytes(lambda b: b[:40], CONFIG), DataError, "config.json: not readable as JSON"),
    "a size that is not said": ("hf", _without(CONFIG, "hidden_size"), ConfigError, "'hidden_size' is missing"),
    "another architecture": (
        "hf", _json(CONFIG, model_type="mamba", architectures=["MambaForCausalLM"]), ConfigError, "mamba",
    ),
    "heads that do not divide": (
        "hf", _json(CONFIG, num_attention_heads=5, num_key_value_heads=5, head_dim=None), ConfigError,
        "hidden 32 is not divisible by heads 5",
    ),
    "quantised weights": (
        "hf", _json(CONFIG, quantization_config={"quant_method": "gptq"}), ConfigError, "quantization_config",
    ),
    "a tokenizer with code of its own": (
        "hf", _json("tokenizer_config.json", auto_map={"AutoTokenizer": "a/b--evil.T"}), DataError, "auto_map",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_a_faulty_directory_is_refused(made: Path, tmp_path: Path, fault: str) -> None:
    kind, plant, error, message = SOURCE_FAULTS[fault]
    source = Path(shutil.copytree(made / kind, tmp_path / "source"))
    from_hf(source, tmp_path / "good")  # so that the fault, and nothing else, is what is refused
    plant(source)
    _refused(lambda: from_hf(source, tmp_path / "out"), error, message, tmp_path)


def test_a_place_that_is_no_directory_is_refused(made: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", made / "hf" / CONFIG, tmp_path):
        _refused(lambda place=place: from_hf(place, tmp_path / "out"), DataError, str(place), tmp_path)


class _Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_pickled_weights_are_read_if_asked_for_and_run_nothing(made: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made / "hf", tmp_path / "source"))
    _pickled(source)
    from_hf(source, tmp_path / "out", allow_pickle=True)
    assert diff(made / "checkpoint", tmp_path / "out")["same"] is True
    torch.save({GATE: _Runs(tmp_path / "ran")}, source / "pytorch_model.bin")
    _refused(lambda: from_hf(source, tmp_path / "two", allow_pickle=True), DataError, "pytorch_model.bin", tmp_path)


def test_code_that_a_configuration_names_is_neither_run_nor_carried(made: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made / "hf", tmp_path / "source"))
    _json(CONFIG, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(source)
    (source / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    from_hf(source, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / CONFIG).read_text())
    assert not [path for place in ("checkpoint", "out") for path in (tmp_path / place).rglob("*.py")]


def _shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _again(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A fault by someone who seals what he did."""

    def apply(checkpoint: Path) -> None:
        change(checkpoint)
        (checkpoint / SEAL).unlink()
        seal(checkpoint)

    return apply


def _model(**values: object) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        facts = read_facts(checkpoint)
        facts["model"].update(values)
        (checkpoint / "run.json").write_text(json.dumps(facts))

    return _again(apply)


def _hostile(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Runs(checkpoint.parent / "ran")))


CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Path], object], type[OctoError], str]] = {
    "a flipped byte": (lambda c: _flip(_shard(c)), CheckpointError, "distcp: has been altered"),
    "a shard cut short": (lambda c: os.truncate(_shard(c), 100), CheckpointError, "distcp: holds 100 bytes"),
    "a missing shard": (lambda c: _shard(c).unlink(), CheckpointError, "distcp: is missing"),
    "no list of tensors": (lambda c: (c / ".metadata").unlink(), CheckpointError, ".metadata"),
    "a file too many": (lambda c: (c / "__9_0.distcp").touch(), CheckpointError, "not part of the sealed"),
    "no seal": (lambda c: (c / SEAL).unlink(), CheckpointError, "no seal.json"),
    "no facts": (lambda c: (c / "run.json").unlink(), CheckpointError, "run.json: is missing"),
    "fewer layers than stored": (_model(layers=1), DataError, "extra decoder.layers.1"),
    "more layers than stored": (_model(layers=3), DataError, "missing decoder.layers.2"),
    "fewer rows than tokens": (_model(vocabulary=500), DataError, "misshapen embedding"),
    "another width": (_model(ffn=24), DataError, "misshapen"),
    "a head that is not stored": (_model(tied_embeddings=False), DataError, "missing output_layer.weight"),
    "a tokenizer larger than the vocabulary": (_model(vocabulary=260), CertificateError, "260"),
    "a list of tensors that runs code": (_again(_hostile), CheckpointError, "cannot be trusted"),
    "no tokenizer": (
        _again(lambda c: shutil.rmtree(c / "hugging_face")), ConfigError, "no tokenizer is known .* --tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_faulty_checkpoint_is_refused(made: Path, tmp_path: Path, fault: str) -> None:
    plant, error, message = CHECKPOINT_FAULTS[fault]
    checkpoint = Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))
    plant(checkpoint)
    # Without its facts a checkpoint names no tokenizer, which would be missed first.
    tokenizer = made / "tokenizer" if fault == "no facts" else None
    _refused(lambda: to_hf(checkpoint, tmp_path / "out", tokenizer), error, message, tmp_path)


def test_one_ranks_part_of_a_checkpoint_is_not_taken_for_it(made: Path, tmp_path: Path) -> None:
    """What a tensor-parallel rank saved by itself: each split tensor is half as long."""
    whole = TorchDist(made / "checkpoint")
    shapes = {name: (shape[0] // 2, *shape[1:]) for name, shape in whole.shapes().items() if len(shape) > 1}
    part: TensorSource = Selected(whole, {**whole.shapes(), **shapes})
    assert read(part, "embedding.word_embeddings.weight").shape == (192, 32)
    write_model(tmp_path / "rank0", part, {"model": read_facts(made / "checkpoint")["model"]}, {})
    shutil.copytree(made / "checkpoint" / "hugging_face", tmp_path / "tokenizer")
    call = lambda: to_hf(tmp_path / "rank0", tmp_path / "out", tokenizer=tmp_path / "tokenizer")  # noqa: E731
    _refused(call, DataError, r"misshapen .*linear_qkv.weight \[32, 32\] instead of \[64, 32\]", tmp_path)


POINTERS = {"": "is empty", "\x00\xff nonsense": "nonsense", "step_00000099": "names 'step_00000099'"}


@pytest.mark.parametrize("text", POINTERS)
def test_a_run_whose_pointer_is_bad_is_refused(made: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(made / "checkpoint", tmp_path / "run" / "checkpoints" / "step_00000008")
    (tmp_path / "run" / "latest").write_text(text)
    _refused(lambda: to_hf(tmp_path / "run", tmp_path / "out"), CheckpointError, POINTERS[text], tmp_path)


def test_targets_and_options_that_cannot_be_are_refused(made: Path, tmp_path: Path) -> None:
    hf, checkpoint = (Path(shutil.copytree(made / name, tmp_path / name)) for name in ("hf", "checkpoint"))
    out = tmp_path / "out"
    for call, error, message in (
        (lambda: from_hf(hf, hf), ConfigError, "hf: already exists"),
        (lambda: to_hf(checkpoint, checkpoint), ConfigError, "checkpoint: already exists"),
        (lambda: from_hf(hf, tmp_path), ConfigError, "already exists"),
        (lambda: to_hf(checkpoint, out, dtype="int4"), ConfigError, "dtype 'int4'; known are"),
        (lambda: to_hf(hf, out), CheckpointError, "hf"),
        (lambda: from_hf(checkpoint, out), DataError, "checkpoint"),
        (lambda: to_hf(tmp_path / "nothing", out), CheckpointError, "no such directory"),
        (lambda: to_hf(checkpoint, out, tokenizer=tmp_path / "none"), DataError, "holds no tokenizer"),
        (lambda: to_hf_many(2 * [(checkpoint, out)]), ConfigError, "named as target twice"),
        (lambda: from_hf(hf, out, layout="deepspeed"), ConfigError, "deepspeed"),
    ):
        _refused(call, error, message, tmp_path)

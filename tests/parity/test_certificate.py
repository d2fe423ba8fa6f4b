"""A certificate holds for what it describes, is repeated from scratch, and refuses what was altered."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from certified import KINDS, Memory, World, change_weights
from transformers import AutoModelForCausalLM
from upath import UPath

from megatron_octo.checkpoint.tensors import Shape
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import certificate as certificates
from megatron_octo.convert import forward
from megatron_octo.convert.agreement import check_logits, check_reference, check_rope
from megatron_octo.convert.certificate import (
    CHECKS,
    certify,
    examine,
    explain,
    require_valid,
    verify,
    write_certificate,
)
from megatron_octo.convert.forward import Outputs, Probe, probes, single_process
from megatron_octo.convert.safetensors_io import SafetensorsDirectory
from megatron_octo.errors import CertificateError, DataError
from megatron_octo.files import hash_json
from megatron_octo.model.hugging_face import to_hf_config

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("certified"))


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with single_process():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_proven(world: World, kind: str) -> None:
    directory = world.make(kind)
    certificate = world.certificates[kind]
    assert explain(certificate) == certificate["failed"] == [] and certificate["valid"] is True
    assert all(certificate[name]["passed"] is True and certificate[name]["faults"] == [] for name in CHECKS)
    layers = 9 + {"qwen2": 3, "qwen3": 2}.get(kind, 0)
    expected = 3 * layers + 2 + (kind == "untied")
    assert certificate["coverage"]["tensors"] == certificate["coverage"]["covered"] == expected
    assert certificate["round_trip"]["bitwise"] is True
    assert certificate["logits"]["max_abs_difference"] < 1e-5
    assert certificate["logits"]["greedy_match"] == 1.0
    assert certificate["logits"]["prompt_lengths"] == [1, 7, 33, 64, 2048]
    assert certificate["logits"]["last_positions"] == [0, 6, 16352, 16383, 2047]
    assert certificate["vocabulary"]["padding_rows"] == 72
    assert certificate["tied_head"]["tied"] is (kind != "untied")
    assert certificate["dtype"]["export"] == ("bfloat16" if kind == "bf16" else "float32")
    assert certificate["lineage"]["tokens"] == 640
    assert set(certificate["files"]) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert require_valid(directory) == certificate
    report = verify(directory, strict=True)
    assert report["not_repeated"] == [] and report["logits"]["max_abs_difference"] < 1e-5


@pytest.mark.parametrize("kind", ["untied", "qwen3"])
def test_streamed_passes_are_those_of_whole_models(world: World, kind: str) -> None:
    """The same logits bit for bit as `from_pretrained` gives, at plain and at far positions."""
    directory, model = world.make(kind), world.origins[kind].model
    batches = probes(model)
    streamed = forward.transformers_outputs(directory, model, SafetensorsDirectory(directory), batches)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    short, long = batches
    with torch.no_grad():
        tokens, positions = torch.tensor([short.rows[-1]]), torch.tensor([short.positions])
        far = whole(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits[0, -32:]
        plain = whole(torch.tensor(long.rows)).logits[0, -32:]
    torch.testing.assert_close(streamed.logits[3], far, rtol=1e-5, atol=1e-5)
    assert torch.equal(streamed.logits[4], plain)


class Watched(Memory):
    """Notes how many values a model holds whenever one of its tensors is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.model: torch.nn.Module | None = None
        self.held_at_reads: list[int] = []

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        self.held_at_reads.append(sum(p.numel() for p in self.model.parameters() if not p.is_meta))
        super().fill(name, start, out)


@pytest.mark.parametrize(("kind", "embedding"), [("untied", 0), ("tied", 384 * 64)])
def test_a_streamed_pass_holds_one_tensor_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str, embedding: int
) -> None:
    """When a tensor is read, nothing is held but the embedding where a tied head needs it, or a fused layer's norm."""
    world.make(kind)
    origin = world.origins[kind]
    watched, original = Watched(origin.held.held), forward.needed_shapes

    def needed_shapes(model: torch.nn.Module, names: dict[str, str]) -> dict[str, Shape]:
        watched.model = model
        return original(model, names)

    monkeypatch.setattr(forward, "needed_shapes", needed_shapes)
    forward.megatron_outputs(origin.model, watched, [Probe([[1, 2]], [0, 1])])
    assert max(watched.held_at_reads) == embedding
    assert len(watched.held_at_reads) == len(origin.held.held)
    assert all(parameter.is_meta for parameter in watched.model.parameters())


def test_far_positions_show_what_short_distances_hide(world: World) -> None:
    """With another RoPE factor short prompts give nearly the same logits; one that jumps to far positions does not."""
    world.make("tied")
    origin = world.origins["tied"]
    other = origin.model.model_copy(
        update={"rope_scaling": origin.model.rope_scaling.model_copy(update={"factor": 32})}
    )
    batches = probes(origin.model)
    one, two = (forward.megatron_outputs(model, origin.held, batches) for model in (origin.model, other))
    differences = [float((a - b).abs().max()) for a, b in zip(one.logits, two.logits, strict=True)]
    assert max(differences[:2]) < 1e-3 and differences[3] > 1e-2, differences


def test_probes_fit_any_model() -> None:
    sizes = {"layers": 1, "hidden": 8, "heads": 2, "kv_groups": 1, "ffn": 8, "vocabulary": 10}
    for positions in (5, 40, 64, 100, 9000, 131072):
        for probe in probes(ModelConfig(**sizes, max_positions=positions)):
            assert len(probe.positions) == max(map(len, probe.rows)) <= positions
            assert max(probe.positions) < positions and len(set(probe.positions)) == len(probe.positions)
    assert probes(ModelConfig(**sizes, max_positions=131072))[0].positions[-1] == forward.FAR + 31


def test_a_checkpoint_of_other_shapes_is_not_run(world: World) -> None:
    world.make("tied")
    origin = world.origins["tied"]
    narrow = origin.model.model_copy(update={"ffn": origin.model.ffn // 2})
    deeper = origin.model.model_copy(update={"layers": origin.model.layers + 1})
    fewer = origin.model.model_copy(update={"layers": origin.model.layers - 1})
    cases = ((narrow, "misshapen .*linear_fc1.weight"), (deeper, "missing decoder.layers.3"), (fewer, "extra decoder"))
    for model, message in cases:
        with pytest.raises(DataError, match=message):
            forward.megatron_outputs(model, origin.held, [Probe([[1, 2]], [0, 1])])


@pytest.mark.parametrize(("factor", "dim", "theta"), [(8.0, 128, 500000.0), (32.0, 64, 500000.0), (None, 128, 10000.0)])
def test_rope_tables_agree_at_the_published_sizes(factor: float | None, dim: int, theta: float) -> None:
    """Llama 3.1 8B, Llama 3.2 1B and Llama 2 frequencies, up to position 131072."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": theta, "rope_scaling": {"factor": factor} if factor else None}
    model = ModelConfig(layers=1, hidden=2 * dim, heads=2, kv_groups=1, ffn=8, vocabulary=10, **rope)
    config = LlamaConfig(**to_hf_config(model, "float32"))
    ours = RotaryEmbedding(dim, 1.0, rotary_base=theta, rope_scaling=bool(factor), rope_scaling_factor=factor or 1.0)
    facts = check_rope(ours.inv_freq.cpu(), LlamaRotaryEmbedding(config).inv_freq, model)
    assert facts["passed"], facts
    assert facts["at_position"] == 131072


def _outputs(*logits: list[float]) -> Outputs:
    return Outputs([torch.tensor([row]) for row in logits], torch.ones(1), [])


def test_each_measure_of_the_logits_refuses_by_itself() -> None:
    one, two = [Probe([[0]], [0])], [Probe([[0], [0]], [0])]
    same = check_logits(_outputs([9.0, 1.0]), _outputs([9.0, 1.0]), one)
    assert same["passed"] and same["kl"] == 0 and same["greedy_match"] == 1
    assert not check_logits(_outputs([9.0, 1.0]), _outputs([9.0, 1.1]), one)["passed"]
    # One large logit makes the tolerance wide; the distribution over the others still shows the difference.
    far = check_logits(_outputs([-1e5, 1.0, 0.0]), _outputs([-1e5, 1.5, 0.0]), one)
    assert far["max_abs_difference"] < far["tolerance"] and far["kl"] > 1e-3 and not far["passed"]
    nan = check_logits(_outputs([9.0, 1.0], [1.0, 2.0]), _outputs([9.0, 1.0], [math.nan, 2.0]), two)
    assert not nan["passed"] and len(nan["faults"]) == 1
    assert not check_reference(_outputs([9.0, math.nan]), [[9.0, 1.0]])["passed"]
    assert not check_reference(_outputs([9.0, 1.0]), [[9.0]])["passed"]


def test_a_directory_at_a_url_is_verified_there(world: World) -> None:
    directory = world.make("tied")
    target = UPath("memory://certified/tied")
    target.mkdir(parents=True)
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    assert verify(target, strict=True)["files"] == 5
    (target / "model.safetensors").write_bytes(b"")
    with pytest.raises(CertificateError, match="model.safetensors: changed .* coverage: .* not a safetensors file"):
        verify(target)


# --- what was altered after certification


def _flip_a_bit(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


def _edit(*, sealed: bool = False, **values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "certificate.json"
        content = {**json.loads(path.read_text()), **values}
        if sealed:
            del content["self_sha256"]
            content["self_sha256"] = hash_json(content)
        path.write_text(json.dumps(content))

    return change


ALTERATIONS = {
    "a changed byte": (_flip_a_bit, "model.safetensors: changed since it was certified"),
    "a missing file": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "an added file": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "adapter_config.json: not in the certificate",
    ),
    "no certificate": (lambda d: (d / "certificate.json").unlink(), "certificate.json: missing"),
    "an edited certificate": (_edit(valid=True, failed=["logits"]), "self_sha256 does not fit its content"),
    "another format": (_edit(sealed=True, format=1), "format 1"),
    "an invalid one": (_edit(sealed=True, valid=False, failed=["rope"]), "valid is false, failed: rope"),
    "half a certificate": (lambda d: (d / "certificate.json").write_text('{"valid": tr'), "not readable as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_directory_is_refused(world: World, tmp_path: Path, alteration: str) -> None:
    change, message = ALTERATIONS[alteration]
    directory = world.copy("tied", tmp_path / "out")
    change(directory)
    for look in (require_valid, verify):
        with pytest.raises(CertificateError, match=message):
            look(directory)


def test_logits_are_repeated_and_not_believed(world: World, tmp_path: Path) -> None:
    """A certificate made up for other weights, every hash right: the repeated forward pass contradicts it."""
    directory = world.copy("tied", tmp_path / "out")
    change_weights(directory, lambda tensors: tensors["model.norm.weight"].mul_(1.1))
    _edit(sealed=True, files=certificates.file_digests(directory))(directory)
    assert require_valid(directory)["valid"] is True
    with pytest.raises(CertificateError, match="logits: logits differ by .* from the recorded"):
        verify(directory)


def test_strict_also_refuses_what_is_merely_unknown(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = world.copy("tied", tmp_path / "out")
    (directory / "README.md").write_text("# a model card")
    (directory / ".note").write_text("hidden")
    here = certificates.versions()
    monkeypatch.setattr(certificates, "versions", lambda: {**here, "transformers": "4.99"})
    assert verify(directory)["valid"] is True
    problems = examine(directory, strict=True)["problems"]
    assert sorted(problems) == [
        ".note: not in the certificate",
        "README.md: not in the certificate",
        f"transformers: version 4.99 here, {here['transformers']} when it was certified",
    ]
    with pytest.raises(CertificateError, match="version 4.99 here"):
        verify(directory, strict=True)


def test_strict_refuses_a_check_that_cannot_be_repeated(world: World, tmp_path: Path) -> None:
    directory = world.copy("tied", tmp_path / "out")
    logits = {"passed": True, "faults": []}
    _edit(sealed=True, logits=logits)(directory)
    assert examine(directory)["problems"] == []
    assert examine(directory, strict=True)["problems"] == [
        "rope: could not be repeated", "logits: could not be repeated",
    ]  # fmt: skip


def test_an_honest_but_invalid_certificate_is_refused(world: World, tmp_path: Path) -> None:
    directory = world.copy("tied", tmp_path / "out")
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    write_certificate(directory, certify(world.origins["tied"], directory, None))
    with pytest.raises(CertificateError, match="valid is false, failed: end_of_text"):
        require_valid(directory)

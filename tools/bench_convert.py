"""What a conversion costs beside plain safetensors reading and writing, and beside `cp`.

Makes a random Llama with a tokenizer of its own, then runs every way to move it as a process of its own, in turns
and in an order that changes from round to round, so that a slow minute of the machine hits them all alike. Compared
are CPU seconds of whole processes, start-up included; wall seconds depend on the disk and are shown beside them.

    python tools/bench_convert.py --quick              a minute's smoke run, figures without meaning
    python tools/bench_convert.py                      Llama-3.2-1B's shape, the figures of the readme
    python tools/bench_convert.py --shape 8b --rounds 1 --scratch /mnt/large

The last line is one JSON object: CPU seconds of each direction over those of safetensors in the same round, peak
resident memory over the bytes of the weights, and the seconds one certificate takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_octo.config.model import ModelConfig

GIB = 2**30
SHARD_BYTES = 5 * 10**9
POLL_SECONDS = 0.02
COPIES = 3.1
"""Directories of the model's size that exist at a time: the model, its checkpoint and what is being written."""

SHAPES: dict[str, str | None] = {"tiny": None, "1b": "llama32_1b", "3b": "llama32_3b", "8b": "llama31_8b"}
"""The recipes' Llamas by size, and one for --quick."""
_TINY = {"layers": 4, "hidden": 256, "heads": 8, "kv_groups": 2, "ffn": 1024, "vocabulary": 8000}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process cost: CPU, the kernel's part of it, and wall in seconds, peak resident memory in bytes."""

    cpu: float
    system: float
    wall: float
    peak: int


# -- the model


def model_of(shape: str, layers: int | None = None) -> ModelConfig:
    """The model of a size, with another number of layers if asked for."""
    from megatron_octo.config.load import read_yaml
    from megatron_octo.config.model import ModelConfig
    from megatron_octo.config.recipes import RECIPES

    recipe = SHAPES[shape]
    sizes = read_yaml(RECIPES / "models" / f"{recipe}.yaml")["model"] if recipe else _TINY
    return ModelConfig(**{**sizes, "layers": layers or sizes["layers"]})


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, in the order in which they are stored."""
    from megatron_octo.convert.megatron_io import geometry
    from megatron_octo.convert.tables import source_shapes, table_of

    return source_shapes(table_of(model.family), geometry(model))


def weight_bytes(model: ModelConfig) -> int:
    """Size of the weights in bfloat16."""
    return 2 * sum(math.prod(size) for size in tensor_shapes(model).values())


def make_model(out: Path, model: ModelConfig) -> None:
    """Write a random bfloat16 Llama as a Hugging Face directory: weights in shards, configuration, tokenizer."""
    from safetensors.torch import save_file

    from megatron_octo.data.index.train_tokenizer import train_tokenizer

    train_tokenizer(["Question: 12 apples and 7 pears.\nAnswer: 19 fruits in all.\n"], 400, out)
    shapes = tensor_shapes(model)
    shards = list(_shards(shapes))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(_random_tensors({name: shapes[name] for name in names}, number), out / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_size": weight_bytes(model)}
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    (out / "config.json").write_text(json.dumps(_config(model, out), indent=2))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, dims in shapes.items():
        more = 2 * math.prod(dims)
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Values of a trained model's size; norms differ from one, so that a lost norm shows."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(dims, dtype=torch.bfloat16).normal_(1.0 if "norm" in name else 0.0, 0.02, generator=draw)
        for name, dims in shapes.items()
    }


def _config(model: ModelConfig, tokenizer: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from megatron_octo.model.hugging_face import to_hf_config

    tokens = AutoTokenizer.from_pretrained(str(tokenizer))
    return to_hf_config(model, "bfloat16", bos=tokens.bos_token_id, eos=tokens.eos_token_id)


# -- what is measured: each runs in a process of its own


def copy_with_safetensors(source: Path, out: Path) -> None:
    """The plain way: load each file with the safetensors library and save it again."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), out / path.name, {"format": "pt"})


def write_without_certificate(checkpoint: Path, out: Path) -> None:
    """What `octo convert to-hf` does before it proves the result: the checkpoint's seal held against its files too."""
    from megatron_octo.convert.api import write_hf
    from megatron_octo.convert.megatron_io import read_origin
    from megatron_octo.publish import publishing

    origin = read_origin(checkpoint)
    origin.require_intact()
    with publishing(out, {}, last="config.json") as partial:
        write_hf(origin, partial, origin.tokenizer, None, SHARD_BYTES)


def certify(checkpoint: Path, written: Path) -> None:
    """The proof alone, of a directory that is there."""
    from megatron_octo.convert.certificate import certify as examine
    from megatron_octo.convert.certificate import explain
    from megatron_octo.convert.megatron_io import read_origin

    certificate = examine(read_origin(checkpoint), written, None)
    if not certificate["valid"]:
        raise SystemExit("the certificate does not hold: " + "; ".join(explain(certificate)))


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "safetensors": copy_with_safetensors, "to_hf": write_without_certificate, "certify": certify,
}  # fmt: skip


def command(step: str, source: Path, out: Path) -> list[str]:
    """The argument vector of one step."""
    if step == "cp":
        return ["cp", "-r", "--reflink=never", str(source), str(out)]
    if step == "from_hf":
        return [sys.executable, "-m", "megatron_octo.cli", "convert", "from-hf", str(source), str(out)]
    return [sys.executable, __file__, "--step", step, str(source), str(out)]


def measure(step: str, source: Path, out: Path) -> Cost:
    """Run one step to its end.

    The peak is what the kernel notes of each process (VmHWM), asked for all the time: `ru_maxrss` would count the
    memory of whoever started the process too.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command(step, source, out), stdout=said, stderr=said)
        peaks: dict[int, int] = {}
        try:
            while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
                peaks |= _peaks(child.pid)
                time.sleep(POLL_SECONDS)
            child.returncode = os.waitstatus_to_exitcode(ended[1])
        finally:
            if child.returncode is None:  # interrupted
                child.kill()
                child.wait()
        wall = time.perf_counter() - began
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{step} failed:\n{said.read().decode(errors='replace')[-4000:]}")
    used = ended[2]
    return Cost(used.ru_utime + used.ru_stime, used.ru_stime, wall, sum(peaks.values()))


def _peaks(pid: int) -> dict[int, int]:
    """Peak resident bytes so far of a process and of those it started that still run."""
    import psutil

    peaks: dict[int, int] = {}
    try:
        pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        for one in pids:
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peaks[one] = int(line.split()[1]) * 1024
    except (psutil.NoSuchProcess, OSError):
        pass
    return peaks


# -- the rounds


def run_rounds(scratch: Path, rounds: int, certificate: bool) -> dict[str, list[Cost]]:
    """Every step once a round, in an order that turns by one from round to round, over a model that is there.

    The first conversions fill the page cache and leave the checkpoint; they are not counted.
    """
    model, checkpoint, out = scratch / "model", scratch / "checkpoint", scratch / "out"
    measure("from_hf", model, checkpoint)
    sources = {"cp": model, "safetensors": model, "from_hf": model, "to_hf": checkpoint}
    costs: dict[str, list[Cost]] = {step: [] for step in sources}
    steps = list(sources)
    for number in range(rounds):
        for step in steps[number % len(steps) :] + steps[: number % len(steps)]:
            costs[step].append(measure(step, sources[step], out))
            print(f"  round {number + 1}/{rounds}  {step:<12}{costs[step][-1].cpu:8.2f} CPU s", file=sys.stderr)
            shutil.rmtree(out)
    if certificate:
        measure("to_hf", checkpoint, out)
        costs["certificate"] = [measure("certify", checkpoint, out)]
    return costs


def figures(costs: dict[str, list[Cost]], size: int) -> dict[str, float | None]:
    """The figures of the last line; ratios are taken round by round, then their median."""
    result: dict[str, float | None] = {}
    for step in ("from_hf", "to_hf"):
        pairs = zip(costs[step], costs["safetensors"], strict=True)
        result[f"{step}_cpu_vs_safetensors"] = round(median(one.cpu / plain.cpu for one, plain in pairs), 3)
    for step in ("from_hf", "to_hf"):
        result[f"{step}_rss_vs_file"] = round(median(cost.peak for cost in costs[step]) / size, 3)
    proof = costs.get("certificate")
    result["certificate_s"] = round(median(cost.wall for cost in proof), 1) if proof else None
    return result


def table(costs: dict[str, list[Cost]], size: int) -> str:
    """Medians with their spread, one line a step."""
    lines = [f"{'':<12}{'CPU s (min-max)':>26}{'system s':>10}{'wall s (min-max)':>26}{'peak MiB':>10}{'of file':>9}"]
    for step, found in costs.items():
        cpu, wall = _spread([cost.cpu for cost in found]), _spread([cost.wall for cost in found])
        peak, system = median(cost.peak for cost in found), median(cost.system for cost in found)
        lines.append(f"{step:<12}{cpu:>26}{system:>10.2f}{wall:>26}{peak / 2**20:>10.0f}{peak / size:>9.2f}")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def machine() -> str:
    """What the figures belong to: processor, cores, load, versions, commit."""
    from importlib.metadata import version

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":", 1)[1].strip() if names else platform.machine()
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "megatron-core"))
    return f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}; {packages}; commit {commit or 'unknown'}"


def main() -> None:
    """Parse, make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="which Llama (default: 1b)")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--rounds", type=int, default=5, help="how often each step runs (default: 5)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where to make the files")
    parser.add_argument("--skip-certificate", action="store_true", help="certificate_s is null then")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "FROM", "TO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        STEPS[args.step[0]](Path(args.step[1]), Path(args.step[2]))
        return
    if args.rounds < 1 or (args.layers is not None and args.layers < 1):
        parser.error("--rounds and --layers are at least 1")
    model = model_of("tiny" if args.quick else args.shape, args.layers)
    size = weight_bytes(model)
    if not args.scratch.is_dir():
        parser.error(f"--scratch {args.scratch}: no such directory")
    free = shutil.disk_usage(args.scratch).free
    if free < COPIES * size:
        need = f"{COPIES * size / GIB:.1f} GiB are needed"
        parser.error(f"--scratch {args.scratch}: {free / GIB:.1f} GiB free, {need}; name another directory")
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench_convert_", dir=args.scratch) as scratch:
        print(f"a Llama of {size / 2e9:.3f}B parameters, {size / GIB:.2f} GiB in bfloat16", flush=True)
        make_model(Path(scratch) / "model", model)
        costs = run_rounds(Path(scratch), 1 if args.quick else args.rounds, not args.skip_certificate)
    print(table(costs, size))
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    print(json.dumps(figures(costs, size)))


if __name__ == "__main__":
    main()

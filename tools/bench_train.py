"""What the training loop costs on a CPU: beside bare megatron-core, beside transformers, while saving, and to start.

    python tools/bench_train.py --quick              a smoke run of seconds, figures without meaning
    python tools/bench_train.py                      the figures of the readme, about five minutes
    python tools/bench_train.py --only step_overhead tokens_per_s_vs_transformers --rounds 60

The last line is one JSON object:

step_overhead: wall seconds of our step over bare megatron-core's, minus one. Ours is `train_step` with the hooks of a
    real run, reading its data and writing metrics.jsonl and TensorBoard. Bare is zero_grad, forward_backward and
    optimizer.step on the same model and optimizer in the same process, with the batch already in memory.
tokens_per_s_vs_transformers: tokens per second of that same step of ours, over a plain loop around transformers' Llama:
    the same sizes and tokens, fp32, SDPA, fused AdamW, the gradient norm clipped. Each in a process of its own.
async_save_block_ratio: seconds of training that a checkpoint costs when it is written in the background, over those
    when it is not: all the time the loop spends outside `train_step` until the checkpoint is sealed and published.
    The second save of a process is taken: the first one makes the memory that all later ones copy to.
first_step_s: seconds from starting `octo train` to the first line of metrics.jsonl.

Steps are taken in turns, one of each kind a round, in an order that turns too; a process that waits for its turn
sleeps. Ratios are taken within a round, then their median, so a slow minute of the machine hits both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from math import log
from pathlib import Path
from statistics import median
from typing import IO, Any

FIGURES = ("step_overhead", "tokens_per_s_vs_transformers", "async_save_block_ratio", "first_step_s")
WARM_UP, COMPARED = 3, 4
PATIENCE = 300.0
"""Seconds after which a first step or a published checkpoint is not waited for any more."""
UNTIL_SAVE, SAVE_PERIOD = 8, 2000
"""Steps before the measured save, and steps between saves: enough that the next one is never reached."""

_LLAMA = {"family": "llama", "tied_embeddings": False, "max_positions": 512}
STEP_SHAPES: dict[str, dict[str, Any]] = {
    "10m": {
        "model": {**_LLAMA, "layers": 8, "hidden": 256, "heads": 8, "kv_groups": 4, "ffn": 768, "vocabulary": 8192},
        "sequence": 256, "batch": 4,
    },
    "tiny": {
        "model": {**_LLAMA, "layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 512},
        "sequence": 32, "batch": 2,
    },
}  # fmt: skip
"""The Llama of the steps, 10.49M parameters, and one for --quick."""
SAVE_SHAPES: dict[str, dict[str, Any]] = {
    "68m": {
        "model": {**_LLAMA, "layers": 10, "hidden": 640, "heads": 10, "kv_groups": 5, "ffn": 1792, "vocabulary": 16384},
        "sequence": 32, "batch": 1,
    },
    "tiny": STEP_SHAPES["tiny"],
}  # fmt: skip
"""The Llama that is saved: its step is short beside its state of 0.8 GB."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step cost in its process: wall and CPU seconds."""

    wall: float
    cpu: float


# -- the runs


def write_run(folder: Path, shape: dict[str, Any], **changes: Any) -> Path:
    """Write seeded random data and a run file over it."""
    import numpy
    import yaml

    from megatron_octo.data.index.train_tokenizer import train_tokenizer
    from megatron_octo.data.index.writer import write_indexed

    model, chance = shape["model"], numpy.random.default_rng(1)
    folder.mkdir(parents=True)
    train_tokenizer(["one two three"], 300, folder / "tokenizer")
    rows = (chance.integers(model["vocabulary"], size=1000).tolist() for _ in range(max(16, shape["sequence"] // 4)))
    write_indexed(folder / "text", rows, model["vocabulary"])
    step = shape["sequence"] * shape["batch"]
    run = {
        "name": "bench", "out": str(folder / "run"), "dtype": "fp32", "model": model,
        "data": {
            "tokenizer": str(folder / "tokenizer"), "mixture": {"text": {"path": str(folder / "text"), "weight": 1}},
            "sequence_length": shape["sequence"],
        },
        "batch": {"global_batch": shape["batch"], "micro_batch": shape["batch"]},
        "schedule": {"learning_rate": 1e-4, "tokens": 3 * SAVE_PERIOD * step},
        "checkpoint": {"every": SAVE_PERIOD * step, "keep": 1},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, **changes}))
    return path


# -- what is measured: each runs in a process of its own


@contextmanager
def training(file: Path, *overrides: str) -> Iterator[tuple[Any, Any, Any]]:
    """A run that is set up as `octo train` does it -> its engine, state and hooks."""
    from megatron_octo.runtime import groups, quick_import
    from megatron_octo.runtime.stop import StopSignals
    from megatron_octo.runtime.watchdog import watch_ranks
    from megatron_octo.train.api import load_run

    quick_import.import_megatron()
    from megatron_octo.train.hooks.default import default_hooks
    from megatron_octo.train.setup import set_up

    run = load_run(file, list(overrides))
    run.out.mkdir(parents=True, exist_ok=True)
    runtime = groups.initialize(run.parallel, run.seed, run.timeout_minutes)
    with StopSignals() as signals, watch_ranks(runtime, run.timeout_minutes) as watchdog:
        engine, state = set_up(run, runtime)
        watchdog.follow(lambda: f"step {state.step + 1} of {run.steps}", lambda: state.aside)
        with default_hooks(engine, state, run.steps, signals) as hooks:
            yield engine, state, hooks


def octo_steps(folder: Path, stack: ExitStack) -> dict[str, Callable[[], float]]:
    """A step of ours, and one of bare megatron-core on the same model; each gives its loss."""
    from megatron_octo.train.step import train_step

    engine, state, hooks = stack.enter_context(training(folder / "run.yaml"))
    _note_tokens(folder, engine)
    batches = [engine.batches.of_step(step) for step in range(COMPARED)]

    def octo() -> float:
        facts = train_step(engine, state, hooks)
        hooks.after_step(state, facts)
        return facts.loss

    def forward(stream: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Callable[..., Any]]:
        batch = next(stream)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def total(losses: Any) -> tuple[Any, Any, Any]:
            mask = batch["loss_mask"]
            loss = (losses * mask).sum()
            return loss, mask.sum().int(), loss.detach()

        return losses, total

    def bare() -> float:
        batch = batches[0]
        (model,) = state.chunks
        model.zero_grad_buffer()
        state.optimizer.zero_grad()
        losses = engine.forward_backward(
            forward_step_func=forward, data_iterator=iter(batch), model=model, num_microbatches=len(batch),
            seq_length=state.run.data.sequence_length, micro_batch_size=state.run.batch.micro_batch, forward_only=False,
        )  # fmt: skip
        state.optimizer.step()
        return float(sum(losses)) / state.run.tokens_per_step

    return {"octo": octo, "megatron": bare}


def _note_tokens(folder: Path, engine: Any) -> None:
    """Leave the tokens of the first steps for the peer: [step, sequence, position]."""
    import torch

    batches = [engine.batches.of_step(step)[0] for step in range(COMPARED)]
    whole = [torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1) for batch in batches]
    torch.save(torch.stack(whole), folder / "tokens.pt")


def transformers_steps(folder: Path, _: ExitStack) -> dict[str, Callable[[], float]]:
    """A step of a plain loop around transformers' Llama, with what makes one fast on a CPU."""
    import torch
    from torch.nn import functional
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_octo.config.model import ModelConfig
    from megatron_octo.model.facts import parameter_count
    from megatron_octo.model.hugging_face import to_hf_config
    from megatron_octo.train.api import load_run

    run = load_run(folder / "run.yaml")
    sizes: ModelConfig = run.model
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(LlamaConfig(**to_hf_config(sizes, "float32"), attn_implementation="sdpa")).train()
    count = sum(weight.numel() for weight in model.parameters())
    if count != parameter_count(sizes):
        raise SystemExit(f"the two models differ: {count} parameters, {parameter_count(sizes)} are ours")
    adam = run.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), run.schedule.learning_rate, (adam.beta1, adam.beta2), adam.epsilon, adam.weight_decay,
        fused=True,
    )  # fmt: skip
    batches = cycle(torch.load(folder / "tokens.pt"))

    def step() -> float:
        batch = next(batches)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adam.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {"transformers": step}


def save(folder: Path, asynchronous: str) -> None:
    """Train through two saves and print how long each kept the loop from training, in seconds."""
    with training(folder / "run.yaml", f"checkpoint.asynchronous={asynchronous}") as run:
        print(json.dumps([_train_through_save(*run, number) for number in (1, 2)]))


def _train_through_save(engine: Any, state: Any, hooks: Any, number: int) -> float:
    """From a few steps before a save to its checkpoint."""
    from megatron_octo.checkpoint.store import checkpoint_at
    from megatron_octo.errors import CheckpointError
    from megatron_octo.train.step import train_step

    state.step = number * SAVE_PERIOD - UNTIL_SAVE
    outside: list[float] = []
    deadline, published = time.perf_counter() + PATIENCE, False
    while not published:
        facts = train_step(engine, state, hooks)
        began = time.perf_counter()
        hooks.after_step(state, facts)
        outside.append(time.perf_counter() - began)
        with suppress(CheckpointError):
            published = checkpoint_at(state.run.out, number * SAVE_PERIOD * state.run.tokens_per_step).is_dir()
        if time.perf_counter() > deadline or len(outside) == SAVE_PERIOD:
            raise SystemExit(f"no checkpoint after {len(outside)} steps")
    usual = median(outside[: UNTIL_SAVE - 1])
    return sum(seconds - usual for seconds in outside[UNTIL_SAVE - 1 :])


STEPPERS = {"octo": octo_steps, "transformers": transformers_steps}


def step_on_request(kind: str, folder: Path) -> None:
    """Take the step each line of stdin names; answer with its cost and loss."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with ExitStack() as stack:
        steps = STEPPERS[kind](folder, stack)
        print("ready", file=answers)
        for line in sys.stdin:
            step, wall, cpu = steps[line.strip()], time.perf_counter(), time.process_time()
            loss = step()
            print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, loss]), file=answers)


# -- the rounds


class Stepper:
    """A process that takes steps when told to."""

    def __init__(self, kind: str, folder: Path, said: IO[bytes], environment: dict[str, str]) -> None:
        self.kind, self._said = kind, said
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", kind, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        self._hear()

    def step(self, name: str) -> tuple[Cost, float]:
        """Take one -> its cost and its loss."""
        with suppress(BrokenPipeError):
            self._process.stdin.write(name + "\n")
        wall, cpu, loss = json.loads(self._hear())
        return Cost(wall, cpu), loss

    def _hear(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SystemExit(f"{self.kind} failed:\n{_tail(self._said)}")
        return line

    def close(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        self._process.wait()


def _tail(said: IO[bytes]) -> str:
    said.seek(0)
    return said.read().decode(errors="replace")[-4000:]


def run_steps(folder: Path, rounds: int, environment: dict[str, str]) -> dict[str, list[Cost]]:
    """Every kind of step once a round, in an order that turns by one from round to round, after some to warm up."""
    with ExitStack() as stack:
        who: dict[str, Stepper] = {}
        for kind, names in (("octo", ("octo", "megatron")), ("transformers", ("transformers",))):
            said = stack.enter_context(tempfile.TemporaryFile())
            stepper = Stepper(kind, folder, said, environment)
            stack.callback(stepper.close)
            who |= dict.fromkeys(names, stepper)
        names, costs = list(who), {name: [] for name in who}
        for number in range(-WARM_UP, rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                cost, loss = who[name].step(name)
                if number == -WARM_UP:
                    _check_loss(name, loss, folder)
                if number >= 0:
                    costs[name].append(cost)
    return costs


def _check_loss(name: str, loss: float, folder: Path) -> None:
    """A first loss far from that of a model that knows nothing: it does not do what the others do."""
    import yaml

    chance = log(yaml.safe_load((folder / "run.yaml").read_text())["model"]["vocabulary"])
    if abs(loss - chance) > 0.5:
        raise SystemExit(f"{name}: the first loss is {loss:.3f}, of random weights it is {chance:.3f}")


def run_saves(folder: Path, rounds: int, environment: dict[str, str]) -> dict[str, list[float]]:
    """Blocked seconds of a save of each kind, in turns."""
    blocked: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    for number in range(rounds):
        for kind in list(blocked)[:: 1 if number % 2 == 0 else -1]:
            shutil.rmtree(folder / "run", ignore_errors=True)
            argv = [sys.executable, __file__, "--save", str(folder), str(kind == "asynchronous").lower()]
            done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{kind} save failed:\n{done.stderr[-4000:]}")
            blocked[kind].append(json.loads(done.stdout.splitlines()[-1])[1])
    return blocked


def time_first_step(folder: Path) -> float:
    """Start `octo train` anew and wait for its first line of metrics; then kill it."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    metrics, began = folder / "run" / "metrics.jsonl", time.perf_counter()
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "megatron_octo.cli", "train", str(folder / "run.yaml")]
        child = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while not metrics.exists() or b"\n" not in metrics.read_bytes():
                if child.poll() is not None or time.perf_counter() - began > PATIENCE:
                    raise SystemExit(f"octo train failed:\n{_tail(said)}")
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            child.kill()  # its rank dies with it
            child.wait()


# -- what is told


def ratios(costs: dict[str, list[Any]], over: str, under: str, part: Callable[[Any], float]) -> list[float]:
    """Round by round, the cost of one kind over that of another."""
    return [part(one) / part(other) for one, other in zip(costs[over], costs[under], strict=True)]


def figures(
    steps: dict[str, list[Cost]] | None, saves: dict[str, list[float]] | None, first: list[float] | None
) -> dict[str, float | None]:
    """The figures of the last line; null where not measured."""
    result: dict[str, float | None] = dict.fromkeys(FIGURES)
    if steps:
        result["step_overhead"] = round(median(ratios(steps, "octo", "megatron", lambda cost: cost.wall)) - 1, 4)
        speed = median(ratios(steps, "transformers", "octo", lambda cost: cost.wall))
        result["tokens_per_s_vs_transformers"] = round(speed, 3)
    if saves:
        blocked = median(ratios(saves, "asynchronous", "synchronous", lambda seconds: seconds))
        result["async_save_block_ratio"] = round(blocked, 3)
    if first:
        result["first_step_s"] = round(median(first), 2)
    return result


def table(
    steps: dict[str, list[Cost]] | None, saves: dict[str, list[float]] | None, first: list[float] | None, tokens: int
) -> str:
    """Medians with their spread, one line a kind."""
    lines = []
    if steps:
        lines.append(f"{'':<14}{'wall ms a step (min-max)':>30}{'CPU ms (min-max)':>30}{'tokens/s':>10}")
        for name, found in steps.items():
            wall, cpu = [1e3 * cost.wall for cost in found], [1e3 * cost.cpu for cost in found]
            lines.append(f"{name:<14}{_spread(wall):>30}{_spread(cpu):>30}{1e3 * tokens / median(wall):>10.0f}")
        for over, under in (("octo", "megatron"), ("transformers", "octo")):
            wall, cpu = (ratios(steps, over, under, part) for part in (lambda cost: cost.wall, lambda cost: cost.cpu))
            lines.append(f"{over} / {under}: wall {_spread(wall, 3)}, CPU {_spread(cpu, 3)}")
    for kind, seconds in (saves or {}).items():
        lines.append(f"{kind} save blocks training for {_spread(seconds)} s")
    if first:
        lines.append(f"octo train to its first step: {_spread(first)} s")
    return "\n".join(lines)


def _spread(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def machine(threads: int) -> str:
    """What the figures belong to: processor, cores, load, versions, commit."""
    from importlib.metadata import version

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(":", 1)[1].strip() if names else platform.machine()
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    load = os.getloadavg()[0]
    return f"{cpu}, {threads} of {os.cpu_count()} cores, load {load:.2f}; {packages}; commit {commit or 'unknown'}"


def main() -> None:
    """Parse, measure, print."""
    args = _parse()
    if args.child:
        step_on_request(args.child[0], Path(args.child[1]))
        return
    if args.save:
        save(Path(args.save[0]), args.save[1])
        sys.stdout.flush()
        os._exit(0)  # as ranks end: a thread that still lives can abort the interpreter's own ending
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    print(machine(args.threads), flush=True)
    shape, saved = STEP_SHAPES["tiny" if args.quick else "10m"], SAVE_SHAPES["tiny" if args.quick else "68m"]
    steps, saves, first = None, None, None
    with tempfile.TemporaryDirectory(prefix="bench_train_", dir=args.scratch) as scratch:
        folder = Path(scratch)
        write_run(folder / "steps", shape, threads=args.threads)
        write_run(folder / "saves", saved, threads=args.threads)
        if {"step_overhead", "tokens_per_s_vs_transformers"} & set(args.only):
            steps = run_steps(folder / "steps", args.rounds, environment)
        if "async_save_block_ratio" in args.only:
            saves = run_saves(folder / "saves", args.save_rounds, environment)
        if "first_step_s" in args.only:
            first = [time_first_step(folder / "steps") for _ in range(args.save_rounds)]
    print(table(steps, saves, first, shape["sequence"] * shape["batch"]))
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    print(json.dumps(figures(steps, saves, first)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="figures to take (default: all)")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind (default: 40)")
    parser.add_argument("--save-rounds", type=int, default=5, help="saves of each kind, and starts (default: 5)")
    parser.add_argument("--threads", type=int, default=cores, help=f"of each process (default: {cores}, the cores)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where to make the files")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.save_rounds = 3, 1
    if min(args.rounds, args.save_rounds, args.threads) < 1:
        parser.error("--rounds, --save-rounds and --threads are at least 1")
    if not args.scratch.is_dir():
        parser.error(f"--scratch {args.scratch}: no such directory")
    return args


if __name__ == "__main__":
    main()

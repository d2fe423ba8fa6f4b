"""What the training loop does with one GPU: milliseconds, tokens/s, TFLOP/s, MFU and memory, precision by precision.

    python tools/bench_gpu.py                                     all rows, about a quarter of an hour on an H200
    python tools/bench_gpu.py --rows 1b-bf16-te 1b-fp8-tensorwise-te --recompute selective

Each row is a run of its own in a process of its own, set up and stepped as `octo train` does it, hooks and optimizer
included: Llama-3.2's shape, sequence 8192, random tokens. Rows that fail, of memory for one, say so and cost no other.
Before them come the roofs: an 8192^3 matrix product in BF16, and in FP8 by torch._scaled_mm.

TFLOP/s count attention as causal and nothing that is computed again (`model.facts.flops_per_token`). MFU is against the
H100's and H200's published dense peaks: 989 TFLOP/s in BF16, 1979 in FP8. The last line is one JSON object: per row
ms_per_step, tokens_per_s, tflops, mfu, of_roof, peak_gib, and loss, the mean over the measured steps; null if the row
failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench_convert import model_of
from bench_train import machine, training, write_run

SEQUENCE, STEPS = 8192, 200
PEAKS = {"bf16": 989e12, "fp8": 1979e12}
ROOF_SIZE, ROOF_ROUNDS = 8192, 50
_KINDS: dict[str, dict[str, Any]] = {
    "bf16-local": {"transformer_impl": "local"},
    "bf16-te": {"transformer_impl": "transformer_engine"},
    "fp8-delayed-te": {"transformer_impl": "transformer_engine", "fp8": {"recipe": "delayed"}},
    "fp8-tensorwise-te": {"transformer_impl": "transformer_engine", "fp8": {"recipe": "tensorwise"}},
}
ROWS = {f"{size}-{kind}": (size, changes) for size, (kind, changes) in product(("1b", "3b"), _KINDS.items())}
"""Name of a row -> its model and what its run file says about precision."""


def write_row(folder: Path, name: str, micro_batch: int, global_batch: int, recompute: str) -> Path:
    """Write the data and the run file of a row."""
    size, changes = ROWS[name]
    shape = {"model": model_of(size).model_dump(mode="json"), "sequence": SEQUENCE, "batch": global_batch}
    batch = {"global_batch": global_batch, "micro_batch": micro_batch}
    length = {"learning_rate": 1e-4, "tokens": STEPS * SEQUENCE * global_batch}
    settings = {"dtype": "bf16", "batch": batch, "recompute": {"kind": recompute}, "schedule": length, **changes}
    return write_run(folder / name, shape, **settings)


def measure_roof(kind: str) -> float:
    """FLOP/s of a large matrix product on this GPU."""
    import torch

    left, right = (torch.randn(ROOF_SIZE, ROOF_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if kind == "fp8":
        left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")

    def multiply() -> None:
        if kind == "fp8":
            torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            left @ right

    return 2 * ROOF_SIZE**3 / median(_timed(multiply) for _ in range(ROOF_ROUNDS))


def _timed(action: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_row(file: Path, warm_up: int, steps: int) -> dict[str, float]:
    """Train and time whole steps -> seconds of the median one, peak bytes, FLOPs of a step, mean loss."""
    import torch

    from megatron_octo.model.facts import flops_per_token
    from megatron_octo.train.step import train_step

    with training(file) as (engine, state, hooks):
        losses: list[float] = []

        def step() -> None:
            facts = train_step(engine, state, hooks)
            hooks.after_step(state, facts)
            losses.append(facts.loss)

        seconds = [_timed(step) for _ in range(warm_up + steps)]
        run = state.run
    flops = flops_per_token(run.model, run.data.sequence_length) * run.tokens_per_step
    return {
        "seconds": median(seconds[warm_up:]), "spread": max(seconds[warm_up:]) - min(seconds[warm_up:]),
        "peak": torch.cuda.max_memory_allocated(), "flops": flops, "tokens": run.tokens_per_step,
        "loss": mean(losses[warm_up:]),
    }  # fmt: skip


def in_a_process(*arguments: str) -> Any:
    """Run one measurement; its answer is the last line it prints. None, with its last words on stderr, if it fails."""
    argv = [sys.executable, __file__, "--measure", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        print(f"{' '.join(arguments[:2])} failed: {said[-1] if said else done.returncode}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def figures(row: dict[str, float] | None, roof: float | None, peak: float) -> dict[str, float | None] | None:
    """What the table and the last line tell about one row."""
    if row is None:
        return None
    speed = row["flops"] / row["seconds"]
    return {
        "ms_per_step": round(1e3 * row["seconds"], 2), "tokens_per_s": round(row["tokens"] / row["seconds"]),
        "tflops": round(speed / 1e12, 1), "mfu": round(speed / peak, 4),
        "of_roof": round(speed / roof, 4) if roof else None, "peak_gib": round(row["peak"] / 2**30, 2),
        "loss": round(row["loss"], 5),
    }  # fmt: skip


def table(rows: dict[str, dict[str, float | None] | None]) -> str:
    """One line a row."""
    names = ("ms_per_step", "tokens_per_s", "tflops", "mfu", "of_roof", "peak_gib", "loss")
    lines = [f"{'':<24}" + "".join(f"{name:>14}" for name in names)]
    for label, row in rows.items():
        lines.append(f"{label:<24}" + "".join(f"{row[name] if row else 'failed':>14}" for name in names))
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    args, parser = _parse()
    if args.measure:
        kind, *rest = args.measure
        found = measure_roof(rest[0]) if kind == "roof" else measure_row(Path(rest[0]), int(rest[1]), int(rest[2]))
        print(json.dumps(found))
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("no CUDA device here: these figures need one (tools/bench_train.py measures on a CPU)")
    print(f"{torch.cuda.get_device_name()}; {machine(1)}", flush=True)
    roofs = {kind: in_a_process("roof", kind) for kind in PEAKS}
    print("roofs: " + ", ".join(f"{kind} {(roof or 0) / 1e12:.0f} TFLOP/s" for kind, roof in roofs.items()), flush=True)
    results: dict[str, dict[str, float | None] | None] = {}
    with tempfile.TemporaryDirectory(prefix="bench_gpu_", dir=args.scratch) as scratch:
        for name in args.rows:
            changes = ROWS[name][1]
            file = write_row(Path(scratch), name, args.micro_batch, args.global_batch, args.recompute)
            found = in_a_process("row", str(file), str(args.warm_up), str(args.steps))
            precision = "fp8" if "fp8" in changes else "bf16"
            results[name] = figures(found, roofs[precision], PEAKS[precision])
            print(table({name: results[name]}), flush=True)
    print(table(results))
    print(json.dumps({**results, "roof_tflops": {kind: round((roof or 0) / 1e12, 1) for kind, roof in roofs.items()}}))


def _parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to take (default: all)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps not counted (default: 10)")
    parser.add_argument("--steps", type=int, default=30, help="steps measured (default: 30)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences a forward pass (default: 1)")
    parser.add_argument("--global-batch", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where to make the files")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.steps, args.micro_batch, args.global_batch) < 1 or not 0 <= args.warm_up <= STEPS - args.steps:
        parser.error(f"--steps and batches are at least 1, --warm-up and --steps together at most {STEPS}")
    return args, parser


if __name__ == "__main__":
    main()

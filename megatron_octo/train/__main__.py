"""One rank of a training run.

Usage: torchrun --nproc-per-node N -m megatron_octo.train RUN.yaml [--until TOKENS] [dotted.key=value ...]

Exit codes: 0 the run, or the leg asked for, is done; 75 saved and stopped by SIGTERM or SIGINT, start the same
command again; otherwise the code of the error, which is one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from pathlib import Path

from megatron_octo.errors import OctoError, StageFailed, machine_problem
from megatron_octo.units import parse_tokens


def main(arguments: list[str] | None = None) -> int:
    """Train as one rank; returns the exit code."""
    options = _parse(arguments)
    # megatron-core warns of packages a machine without CUDA never has, torch of its own older interfaces.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        from megatron_octo.train.api import load_run

        run = load_run(options.run, options.overrides)
        from megatron_octo.train.loop import train

        train(run, options.until)
    except OctoError as error:
        return _report(error)
    except Exception as error:
        problem = machine_problem(error)
        if problem is not None:
            return _report(problem)
        traceback.print_exc()
        if "Timed out waiting" in str(error) or "Timeout" in type(error).__name__:
            return _report(_silence())
        return 1
    return 0


def _report(error: OctoError) -> int:
    print(f"octo: error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _silence() -> OctoError:
    return StageFailed(
        f"rank {os.environ.get('RANK', '0')} waited longer than timeout_minutes for another rank",
        "a rank that hangs or is gone holds up all others",
        "look for the log-rank*.txt that ends first; the last checkpoint is untouched, start the same command again",
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_octo.train", description="One rank of a training run.")
    parser.add_argument("run", type=Path, help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value overrides")
    parser.add_argument(
        "--until", type=parse_tokens, help="stop, with a checkpoint, at this token position of the run, e.g. 40K"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    code = main()
    if code:
        # Process groups of a failed rank may wait for peers that are gone: do not let them hold up the exit.
        sys.stderr.flush()
        os._exit(code)

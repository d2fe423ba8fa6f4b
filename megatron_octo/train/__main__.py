"""One rank of a training run.

Usage: torchrun --nproc-per-node N -m megatron_octo.train RUN.yaml [--until TOKENS] [dotted.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from pathlib import Path

from megatron_octo.errors import OctoError, machine_problem
from megatron_octo.runtime.stop import EXIT_CODES, RankLost, Stopped, StopSignals
from megatron_octo.units import parse_tokens


def main(arguments: list[str] | None = None) -> int:
    """Train as one rank; returns the exit code."""
    with StopSignals() as signals:
        return _train(_parse(arguments), signals)


def _train(options: argparse.Namespace, signals: StopSignals) -> int:
    # megatron-core warns of packages a machine without CUDA never has, torch of its own older interfaces.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        from megatron_octo.train.api import load_run

        run = load_run(options.run, options.overrides)
        from megatron_octo.train.describe import describe_end
        from megatron_octo.train.loop import train

        state = train(run, options.until, signals)
        if os.environ.get("RANK", "0") == "0":
            print(f"octo: {describe_end(state.run, state.step, options.until, trained=True)}", flush=True)
    except OctoError as error:
        # A launcher that ends the others of a failed rank sends them a signal too: then the failure is the news.
        only_lost = isinstance(error, RankLost) and not error.in_its_words
        return _report(_stopped(signals) if signals.told and only_lost else error)
    except Exception as error:
        problem = machine_problem(error)
        if problem is not None:
            return _report(problem)
        traceback.print_exc()
        return _report(_stopped(signals)) if signals.told else 1
    return 0


def _stopped(signals: StopSignals) -> Stopped:
    """What an error means once a signal was received: others ended at once, before they had anything to save."""
    return Stopped(
        f"stopped by {signals.told}; not every rank could save",
        "what was sealed before counts",
        "start the same command again to go on",
    )


def _report(error: OctoError) -> int:
    print(f"octo: error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_octo.train",
        description="One rank of a training run, as torchrun starts it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value overrides")
    parser.add_argument(
        "--until", type=parse_tokens, help="stop, with a checkpoint, at this token position of the run, e.g. 40K"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    code = main()
    # Without the interpreter's own ending: process groups of a failed rank may wait for peers that are gone, and a
    # thread inside a call into a store that does not answer aborts a rank that has done its work.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

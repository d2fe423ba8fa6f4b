"""Kills real trainers with SIGKILL at seeded moments, over and over, and proves that nothing is lost.

Every trainer is a whole one: the process that `octo train` starts for a rank, with its gloo groups, its loop, its
saves and the thread that writes them, forked from a process that has the imports behind it. Half of the kills come at
a moment of the clock, half at the n-th thing the trainer does to the file system (a file opened, renamed or removed),
so that short phases are hit as well; one rank dies, or all at once. After each kill the run directory is looked at as
it was left, and the same run is started again.

    python tools/kill_storm.py --quick                 a smoke run of a few kills
    python tools/kill_storm.py --kills 200 --seed 1    the table of the readme

What would count as *lost*: `latest` names no sealed checkpoint, a seal that does not verify, a checkpoint that was
there before and is not the newest any more, a trainer that refuses to go on. As *silent*: a checkpoint or a line of
metrics that differs in a single bit from those of a run nobody disturbed. As a *hang*: a trainer that does not end.
The last line is one JSON object; the exit code is 1 if any of the three is not 0.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STEPS, SAVE_EVERY, STEP_TOKENS = 24, 3, 64
PATIENCE = 90.0  # seconds after which a trainer that has not ended hangs
GRACE = 3.0  # seconds that the launcher gives the other ranks when one has died
PHASES = ("start-up", "resume", "step", "between steps", "save", "write", "seal", "rename", "pointer", "prune")
SAME = ("step", "tokens", "loss", "learning_rate", "grad_norm")
_TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Scenario(NamedTuple):
    """A way to train: overrides of the run file, and how many processes that takes."""

    name: str
    ranks: int
    layout: tuple[str, ...]
    asynchronous: bool

    @property
    def overrides(self) -> list[str]:
        return [*self.layout, f"checkpoint.asynchronous={str(self.asynchronous).lower()}"]


DATA = ("parallel.data=2",)
SCENARIOS = (
    Scenario("1 process, async", 1, (), True),
    Scenario("DP2, async", 2, DATA, True),
    Scenario("1 process, sync", 1, (), False),
    Scenario("DP2, sync", 2, DATA, False),
)


class Aim(NamedTuple):
    """When a trainer dies: seconds after its start or its first step, or at its n-th touch of the run directory."""

    rank: int | None  # None: all of them
    seconds: float | None = None
    training: bool = False
    touch: int | None = None


class Ended(NamedTuple):
    how: str  # killed, done, refused, hung
    phase: str
    background: bool
    started: float  # seconds until the first step
    trained: float  # seconds from then on
    touches: int


class Board:
    """What each rank is doing, in memory that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 64)

    def enter(self, rank: int, phase: int) -> int:
        place = 2 * rank + (threading.current_thread().name == "checkpoint")
        before, self._memory[place] = self._memory[place], phase
        return before

    def count(self, rank: int, touches: int) -> None:
        struct.pack_into("I", self._memory, 16 + 4 * rank, touches)

    def read(self, rank: int) -> tuple[str, bool, int]:
        """The phase of a rank, whether it is the background thread's, and its touches."""
        main, background = self._memory[2 * rank], self._memory[2 * rank + 1]
        touches = struct.unpack_from("I", self._memory, 16 + 4 * rank)[0]
        return PHASES[background or main], background > 0, touches


def write_run(folder: Path) -> Path:
    """Data and run file of a training that takes a second."""
    import yaml

    from megatron_octo.data.index.writer import write_indexed

    chance = random.Random(7)
    documents = [[chance.randint(1, 90) for _ in range(chance.randint(10, 60))] + [0] for _ in range(200)]
    write_indexed(folder / "text", documents, 91)
    (folder / "tokenizer").mkdir()
    run = {
        "name": "storm", "out": str(folder / "run"), "seed": 5, "dtype": "fp32", "threads": 1, "timeout_minutes": 1,
        "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 91},
        "data": {
            "tokenizer": str(folder / "tokenizer"), "sequence_length": 16,
            "mixture": {"text": {"path": str(folder / "text"), "weight": 1.0}},
        },
        "batch": {"global_batch": 4, "micro_batch": 2},
        "schedule": {"learning_rate": 3e-3, "warmup": STEP_TOKENS, "tokens": STEPS * STEP_TOKENS},
        "checkpoint": {"every": SAVE_EVERY * STEP_TOKENS, "keep": 2},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def import_everything() -> None:
    """What a trainer imports, once for all of them. Nothing here may compute: a fork copies no threads."""
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.event_file_writer  # noqa: F401

    import megatron_octo.train.__main__
    import megatron_octo.train.loop  # noqa: F401


class Trainers:
    """Starts the ranks of one run, kills as told, and waits for them as the launcher does."""

    def __init__(self, run: Path, log: Path) -> None:
        self._run, self._log = run, log

    def train(self, scenario: Scenario, out: Path, aim: Aim | None = None, extra: tuple[str, ...] = ()) -> Ended:
        from megatron_octo.runtime.launch import listen

        board, began = Board(), time.perf_counter()
        arguments = [str(self._run), f"out={out}", *scenario.overrides, *extra]
        with listen() as listener:
            pids = [
                self._fork(rank, scenario.ranks, listener, arguments, board, out, aim) for rank in range(scenario.ranks)
            ]
        codes, first = self._wait(pids, aim, began, board)
        rank = self._victim(pids, codes, aim)
        ended = "done" if rank is None else "killed" if codes[pids[rank]] == -signal.SIGKILL else "refused"
        if None in codes.values():
            ended = "hung"
        phase, background, touches = board.read(rank or 0)
        return Ended(ended, phase, background, first - began, time.perf_counter() - first, touches)

    def _fork(
        self, rank: int, ranks: int, listener: socket.socket, arguments: list[str], board: Board, out: Path,
        aim: Aim | None,
    ) -> int:  # fmt: skip
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            if ranks > 1:
                os.environ.update(_address(rank, ranks, listener))
            tell_phases(board, rank)
            count_touches(board, rank, str(out), aim.touch if aim and aim.rank in (rank, None) else None)
            from megatron_octo.train.__main__ import main

            code = main(arguments)
        finally:
            os._exit(code)

    def _wait(
        self, pids: list[int], aim: Aim | None, began: float, board: Board
    ) -> tuple[dict[int, int | None], float]:
        """Exit codes by process, None for one that had to be ended because it hung; and when the first step began."""
        codes: dict[int, int | None] = {}
        deadline, first, told, due = began + PATIENCE, None, False, None
        if aim is not None and aim.seconds is not None and not aim.training:
            due = began + aim.seconds
        while len(codes) < len(pids) and time.perf_counter() < deadline:
            for pid in [pid for pid in pids if pid not in codes]:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            now = time.perf_counter()
            if first is None and board.read(0)[0] not in ("start-up", "resume"):
                first = now
                due = now + aim.seconds if aim is not None and aim.training else due
            if due is not None and now >= due:
                victims = pids if aim.rank is None else [pids[aim.rank]]
                self._signal([pid for pid in victims if pid not in codes], signal.SIGKILL)
                due = None
            elif any(codes.values()) and not told:  # as the launcher: a notice, a moment, the end
                told, deadline = True, min(deadline, now + GRACE)
                self._signal([pid for pid in pids if pid not in codes], signal.SIGTERM)
            time.sleep(0.001)
        late = [pid for pid in pids if pid not in codes]
        self._signal(late, signal.SIGKILL)
        for pid in late:
            os.waitpid(pid, 0)
            codes[pid] = 0 if told else None
        return codes, first or time.perf_counter()

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in pids:
            os.kill(pid, number)

    def _victim(self, pids: list[int], codes: dict[int, int | None], aim: Aim | None) -> int | None:
        """The rank that was killed; else one that failed by itself; None if all ended well."""
        killed = [rank for rank, pid in enumerate(pids) if codes[pid] == -signal.SIGKILL]
        if aim is not None and aim.rank in killed:
            return aim.rank
        failed = [rank for rank, pid in enumerate(pids) if codes[pid]]
        return (killed or failed or [None])[0]


def tell_phases(board: Board, rank: int) -> None:
    """Have this process write down what it is doing; nothing else changes."""
    from megatron_octo.checkpoint import part, save, store
    from megatron_octo.train import loop, setup

    base = {"now": PHASES.index("start-up")}

    def told(owner: Any, name: str, phase: str) -> None:
        plain, number = getattr(owner, name), PHASES.index(phase)

        def call(*arguments: Any, **options: Any) -> Any:
            before = board.enter(rank, number)
            try:
                return plain(*arguments, **options)
            finally:
                if phase == "step":
                    base["now"] = PHASES.index("between steps")
                board.enter(rank, before if before else base["now"] if _is_main() else 0)

        setattr(owner, name, call)

    told(setup, "load_checkpoint", "resume")
    told(loop, "train_step", "step")
    told(save.Saver, "save", "save")
    told(part.Part, "write", "write")
    told(part.Part, "complete", "write")
    told(store, "publish", "rename")
    told(store, "seal", "seal")
    told(store, "point_at", "pointer")
    told(save, "prune", "prune")


def count_touches(board: Board, rank: int, folder: str, last: int | None) -> None:
    """Count what this process does to files of a folder, and kill it before it does the `last` of them."""
    touches = 0

    def touch(event: str, arguments: tuple) -> None:
        nonlocal touches
        if event not in _TOUCHES:
            return
        inside = isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(folder)
        by_descriptor = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # how a directory is removed
        if inside or by_descriptor:
            touches += 1
            board.count(rank, touches)
            if touches == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touch)


class Truth(NamedTuple):
    """What a run that nobody disturbed made: metrics and hashes of tensor files by step; and what it took."""

    lines: dict[int, dict[str, Any]]
    files: dict[int, dict[str, str]]
    started: float
    trained: float
    touches: int


class Victim:
    """One run directory, from the first kill to the end of the run."""

    def __init__(self, scenario: Scenario, out: Path, truth: Truth) -> None:
        self.scenario, self.out, self.truth = scenario, out, truth
        self.step = 0

    def inspect(self) -> tuple[list[str], list[str]]:
        """Look at the directory as it was left: what is lost, and what is silently wrong."""
        from megatron_octo.checkpoint.seal import verify_seal
        from megatron_octo.checkpoint.store import has_checkpoint, latest_checkpoint, sealed_checkpoints
        from megatron_octo.errors import OctoError

        lost, silent = [], []
        try:
            newest = _step(latest_checkpoint(self.out)) if has_checkpoint(self.out) else 0
            for path in sealed_checkpoints(self.out):
                verify_seal(path)
                if files_of(path) != self.truth.files[_step(path)]:
                    silent.append(f"{path.name} holds other values than the undisturbed run's")
        except OctoError as error:
            return [str(error)], silent
        if newest < self.step:
            lost.append(f"the newest checkpoint was of step {self.step}, now it is of step {newest}")
        self.step = newest
        lines = metrics_of(self.out)
        if sorted(lines) != list(range(1, len(lines) + 1)) or len(lines) < newest:
            lost.append(f"metrics of steps {sorted(lines)} beside a checkpoint of step {newest}")
        silent += [f"metrics of step {n} differ" for n, line in lines.items() if line != self.truth.lines[n]]
        return lost, silent

    def is_whole(self) -> list[str]:
        """After the run's end: whether all of it is what the undisturbed run made."""
        if self.step != STEPS or metrics_of(self.out) != self.truth.lines:
            return [f"ended with a checkpoint of step {self.step} and {len(metrics_of(self.out))} lines of metrics"]
        return []


def files_of(checkpoint: Path) -> dict[str, str]:
    """Hashes of the files that hold every weight and moment."""
    files = json.loads((checkpoint / "seal.json").read_text(encoding="utf-8"))["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith(".distcp")}


def metrics_of(out: Path) -> dict[int, dict[str, Any]]:
    """Lines of metrics by step, a last one that was cut off left out; a step told twice counts by its last line."""
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: {name: line[name] for name in SAME} for line in lines}


class Storm:
    """Kills until enough have been killed, and keeps the count."""

    def __init__(self, folder: Path, scenarios: tuple[Scenario, ...], seed: int) -> None:
        self._folder, self._scenarios, self._chance = folder, scenarios, random.Random(seed)
        self._trainers = Trainers(write_run(folder), folder / "log.txt")
        self._truths: dict[tuple[str, ...], Truth] = {}
        self._number = 0
        self.phases: Counter[tuple[str, str, str]] = Counter()
        self.kills = self.hangs = self.runs = 0
        self.lost: list[str] = []
        self.silent: list[str] = []

    def run(self, kills: int, tell: Callable[[], None]) -> None:
        victims = {scenario: self._victim(scenario) for scenario in self._scenarios}
        while self.kills < kills:
            scenario = self._scenarios[self.kills % len(self._scenarios)]
            victim = victims[scenario]
            ended = self._trainers.train(scenario, victim.out, self._aim(victim))
            self._judge(victim, ended)
            if ended.how == "killed":
                self.kills += 1
                where = "background" if ended.background else "main"
                self.phases[scenario.name, ended.phase, where] += 1
                tell()
            else:
                self._end(victim)
                victims[scenario] = self._victim(scenario)
        for victim in victims.values():
            self._judge(victim, self._trainers.train(victim.scenario, victim.out))
            self._end(victim)

    def _victim(self, scenario: Scenario) -> Victim:
        if scenario.layout not in self._truths:
            self._truths[scenario.layout] = self._undisturbed(scenario)
        self._number += 1
        return Victim(scenario, self._folder / f"run-{self._number}", self._truths[scenario.layout])

    def _undisturbed(self, scenario: Scenario) -> Truth:
        out = self._folder / f"undisturbed-{len(self._truths)}"
        ended = self._trainers.train(scenario._replace(asynchronous=False), out, extra=("checkpoint.keep=99",))
        if ended.how != "done":
            raise SystemExit(f"the undisturbed run {ended.how}:\n{(self._folder / 'log.txt').read_text()[-2000:]}")
        files = {_step(path): files_of(path) for path in (out / "checkpoints").glob("step_*")}
        return Truth(metrics_of(out), files, ended.started, ended.trained, ended.touches)

    def _aim(self, victim: Victim) -> Aim:
        chance, ranks = self._chance, victim.scenario.ranks
        rank = chance.randrange(ranks) if ranks == 1 or chance.random() < 0.75 else None
        truth, left, dice = victim.truth, 1 - victim.step / STEPS, chance.random()
        if dice < 0.2:
            return Aim(rank, seconds=chance.uniform(0, truth.started))
        if dice < 0.5:
            return Aim(rank, seconds=chance.uniform(0, truth.trained * left), training=True)
        # Rank 0 alone seals and publishes: it has most to do with files. Starting takes some touches in any case.
        return Aim(0 if rank is None else rank, touch=chance.randint(1, 15 + int(truth.touches * left * 0.9)))

    def _judge(self, victim: Victim, ended: Ended) -> None:
        lost, silent = victim.inspect()
        name = f"{victim.scenario.name}, {victim.out.name}, {ended.phase}"
        if ended.how == "hung":
            self.hangs += 1
        if ended.how == "refused":
            lost.append("the trainer did not go on: " + (self._folder / "log.txt").read_text()[-500:])
        self.lost += [f"{name}: {what}" for what in lost]
        self.silent += [f"{name}: {what}" for what in silent]

    def _end(self, victim: Victim) -> None:
        self.runs += 1
        self.lost += [f"{victim.scenario.name}, {victim.out.name}: {what}" for what in victim.is_whole()]
        shutil.rmtree(victim.out, ignore_errors=True)


def table(storm: Storm) -> str:
    """Kills by phase and scenario; `+n` fell into the thread that writes while training goes on."""
    names = sorted({scenario for scenario, _, _ in storm.phases})
    rows = [["killed during", *names, "all"]]
    for phase in PHASES:
        cells = []
        for name in names:
            main, beside = (storm.phases[name, phase, where] for where in ("main", "background"))
            cells.append(f"{main} +{beside}" if beside else str(main))
        total = sum(count for (_, one, _), count in storm.phases.items() if one == phase)
        rows.append([phase, *cells, str(total)])
    sums = [str(sum(count for (one, _, _), count in storm.phases.items() if one == name)) for name in names]
    rows.append(["all", *sums, str(storm.kills)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _address(rank: int, ranks: int, listener: socket.socket) -> dict[str, str]:
    """Where the ranks meet, as the launcher tells them; rank 0 takes the listening socket over, others leave it."""
    from megatron_octo.runtime.launch import LISTENER

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    if rank == 0:
        place[LISTENER] = str(listener.detach())
    listener.close()
    return {**place, "WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def main() -> int:
    """Parse, kill, print; 1 if anything was lost, silently wrong, or hung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many trainers to kill (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few kills of one process and of two")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where runs are written")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills is at least 1")
    if not options.scratch.is_dir():
        parser.error(f"--scratch {options.scratch}: no such directory")
    from megatron_octo.progress import Progress

    warnings.simplefilter("ignore")
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    import_everything()
    began, kills = time.perf_counter(), min(options.kills, 6) if options.quick else options.kills
    with tempfile.TemporaryDirectory(prefix="kill_storm_", dir=options.scratch) as scratch:
        storm = Storm(Path(scratch), SCENARIOS[:2] if options.quick else SCENARIOS, options.seed)
        with Progress("kills", kills, "kills") as bar:
            storm.run(kills, lambda: bar.advance(1, lost=len(storm.lost), silent=len(storm.silent), hangs=storm.hangs))
    print(table(storm))
    for kind, found in (("lost", storm.lost), ("silent", storm.silent)):
        for what in found:
            print(f"{kind}: {what}")
    phases = {phase: sum(n for (_, one, _), n in storm.phases.items() if one == phase) for phase in PHASES}
    beside = sum(count for (_, _, where), count in storm.phases.items() if where == "background")
    print(f"{storm.runs} runs brought to their end in {time.perf_counter() - began:.0f} s, seed {options.seed}")
    figures = {"kills": storm.kills, "lost": len(storm.lost), "silent": len(storm.silent), "hangs": storm.hangs}
    print(json.dumps({**figures, "runs": storm.runs, "background": beside, "phases": phases, "seed": options.seed}))
    return int(any((storm.lost, storm.silent, storm.hangs)))


if __name__ == "__main__":
    sys.exit(main())

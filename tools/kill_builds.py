"""Kills real data builds at seeded moments, over and over, and proves that nothing is lost.

Every start is a whole one: the command that a user gives, forked from a process that has the imports behind it. What
is killed: a build that cleans, with corpora of every format, budgets and a tokenizer to train; the repair of a finished
build whose files were deleted or damaged; the jobs of Slurm, run as plain shell; `octo data dedup` and
`decontaminate`; a curation against a server of this machine; with --ray a build on Ray. SIGKILL hits the process that
was started, a worker, or all at once; SIGTERM and Ctrl-C are given too. They come at a moment of the clock or at the
n-th thing done to a file. After each the directory is looked at as it was left, and the same command is given again.

    python tools/kill_builds.py --quick                    a smoke run of a few kills
    python tools/kill_builds.py --kills 300 --seed 1       the long one
    python tools/kill_builds.py --only repair,curate       some kinds

What would count as *lost*: a finished task that is done again, a command that refuses to go on, or ends with a
traceback although nobody was killed; a question that is paid for twice and was not under way. As *silent*: a published
file that differs from those of an undisturbed run, a manifest beside files that are not there, a process, a file or a
directory that is left behind. As a *hang*: a command that does not end. The last line is one JSON object; the exit code
is 1 if any of the three is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from killed_work import Work, serve, works

PATIENCE = 90.0  # seconds after which a command that has not ended hangs
GRACE = 10.0  # seconds for a told process to end, and for workers that lost theirs
SHARES = {"build": 8, "repair": 5, "curate": 5, "dedup": 3, "decontaminate": 2, "slurm": 2}
"""Of the kills, by kind."""

QUICK = {"build": 3, "repair": 2, "dedup": 1, "curate": 2}
_TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
MARK = ("OCTO_KILL_BUILDS", f"{os.getpid()}-{time.monotonic_ns()}")
"""Variable that the processes of a command have, and its value."""
_RAY = """
import sys, ray
context = ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1], logging_level="ERROR")
print("address", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
_SIGNALS = {"started": ("KILL", "TERM"), "worker": ("KILL",), "all": ("KILL", "TERM", "INT")}


class Aim(NamedTuple):
    """What dies, of what, and when: seconds after the start, or before the n-th touch of a file of the directory."""

    victim: str  # "started", "worker" or "all"
    signal: str
    seconds: float | None = None
    touch: int | None = None


class Ended(NamedTuple):
    """How a command ended: its exit code, below 0 for a signal and None where it hung; whether the aim was hit."""

    code: int | None
    seconds: float
    touches: int
    hit: bool


class Starter:
    """Starts commands, kills as told, and waits for them.

    Args:
        folder: the log of all commands goes there; `tmp` in it is their temporary directory, `here` the current one.
    """

    def __init__(self, folder: Path) -> None:
        self.log, self.temporary, self.here = folder / "log.txt", folder / "tmp", folder / "here"
        self.temporary.mkdir()
        self.here.mkdir()

    def run(self, arguments: list[str], out: Path, environment: dict[str, str], aim: Aim | None) -> Ended:
        """One command from its start to its end."""
        reading, writing = os.pipe()
        began = time.monotonic()
        pid = self._fork(arguments, out, environment, aim, writing)
        os.close(writing)
        due = None if aim is None or aim.seconds is None else began + aim.seconds
        code, hit, deadline = None, aim is not None and aim.touch is not None, began + PATIENCE
        while code is None and time.monotonic() < deadline:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
            elif due is not None and aim is not None and time.monotonic() >= due:
                due, hit = None, _strike(pid, aim)
                deadline = time.monotonic() + GRACE if hit and aim.victim != "worker" else deadline
            time.sleep(0.001)
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with os.fdopen(reading) as file:
            touches = int(file.read().strip() or 0)
        return Ended(code, time.monotonic() - began, touches, hit)

    def _fork(self, arguments: list[str], out: Path, environment: dict[str, str], aim: Aim | None, writing: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code: Any = 1
        try:
            os.setsid()
            os.environ |= environment | {"TMPDIR": str(self.temporary), MARK[0]: MARK[1], "COLUMNS": "120"}
            tempfile.tempdir = None
            os.chdir(self.here)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            counted = count_touches(str(out), aim)
            code = _octo(arguments)
            os.write(writing, str(counted[0]).encode())
        finally:
            os._exit(code)

    def said(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-2000:]


def _octo(arguments: list[str]) -> int:
    """`octo` with some arguments in this process; returns its exit code."""
    from megatron_octo.cli.root import main
    from megatron_octo.data.engine import on_slurm

    on_slurm._MOST_JOBS = 2  # of an array, as a site may have it
    sys.argv = ["octo", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return 0


def count_touches(folder: str, aim: Aim | None) -> list[int]:
    """Count what this process does to files of a folder, and strike before the one that is aimed at."""
    count = [0]

    def touch(event: str, arguments: tuple) -> None:
        if event in _TOUCHES and str(arguments[0]).startswith(folder):
            count[0] += 1
            if aim is not None and count[0] == aim.touch:
                _strike(os.getpid(), aim)

    sys.addaudithook(touch)
    return count


def _strike(pid: int, aim: Aim) -> bool:
    """Send what is aimed; returns whether there was anybody to hit."""
    number = getattr(signal, f"SIG{aim.signal}")
    with contextlib.suppress(ProcessLookupError):
        if aim.victim == "all":
            os.killpg(pid, number)
        else:
            victims = [pid] if aim.victim == "started" else _workers()
            if not victims:
                return False
            os.kill(random.Random(aim.seconds).choice(sorted(victims)), number)
    return True


def left_running(pattern: bytes = b"") -> list[int]:
    """Processes that commands have started, by the variable in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if "=".join(MARK).encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes()
                    found += [int(folder.name)] if command and pattern in command else []
    return found


def _workers() -> list[int]:
    """Workers of a build, its jobs, and what they started."""
    return [*left_running(b"spawn_main"), *left_running(b"megatron_octo")]


def files_of(out: Path) -> dict[str, bytes]:
    """Every file in its place; of the answers of a server, which come in any order, only the names."""
    found = {}
    for path in out.rglob("*"):
        parts = path.relative_to(out).parts
        if path.is_file() and path.name != ".lock" and ".work" not in parts:
            found["/".join(parts)] = b"" if parts[0] == "answers" else path.read_bytes()
    return found


def records(out: Path) -> dict[Path, int]:
    """Records of finished tasks, and when each was written."""
    found = {}
    for path in (out / ".work" / "records").rglob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # the last moments of a worker that outlives its build
            found[path] = path.stat().st_mtime_ns
    return found


class Storm:
    """Kills until enough have been killed, and keeps the count."""

    def __init__(self, folder: Path, seed: int, server: str, environment: dict[str, str]) -> None:
        self._folder, self._chance, self._seed = folder, random.Random(seed), seed
        self._starter, self._environment = Starter(folder), environment
        self._truths: dict[str, dict[str, bytes]] = {}
        self._whole: dict[tuple[str, int], Ended] = {}
        self.works = works(folder, lambda name: self._truths[name], server)
        self.kills: Counter[tuple[str, str]] = Counter()
        self.runs: Counter[str] = Counter()
        self.lost: list[str] = []
        self.silent: list[str] = []
        self.hangs = 0

    def learn(self, names: list[str], quick: bool) -> None:
        """Run each kind undisturbed, with one worker and with two: what it leaves, and how long that takes.

        Args:
            names: of the kinds.
            quick: all kinds but the first have one worker only.
        """
        for name in dict.fromkeys(["build", *names]):
            if quick and name != "build":
                self.works[name] = self.works[name]._replace(most_workers=1)
            work = self.works[name]
            for workers in range(1, work.most_workers + 1):
                out = self._folder / f"whole-{work.name}-{workers}"
                found = work.prepare(out, random.Random(self._seed))
                ended = self._starter.run(self._command(work, out, workers, out.name), out, self._variables(work), None)
                self._whole[work.name, workers] = ended
                if ended.code != 0:
                    raise SystemExit(f"undisturbed, {work.name} ends with {ended.code}:\n{self._starter.said()}")
                left = files_of(out)
                truth = self._truths.setdefault(work.truth, left)
                if differing := [name for name in {**truth, **left} if truth.get(name) != left.get(name)]:
                    raise SystemExit(f"{work.name} with {workers} workers leaves other bytes: {differing}, {found}")
                shutil.rmtree(out)

    def run(self, name: str, kills: int, tell: Any) -> None:
        """Start directories of a kind one after the other, each killed until it is whole."""
        work, done = self.works[name], 0
        while done < kills:
            self.runs[name] += 1
            run, mine = f"{name}-{self.runs[name]}", 0
            out, before = self._folder / run, {}
            broken = work.prepare(out, self._chance)
            while True:
                workers = self._chance.randint(1, work.most_workers)
                aim = self._aim(work, workers) if done < kills else None
                ended = self._starter.run(self._command(work, out, workers, run), out, self._variables(work), aim)
                before = self.judge(run, out, work, ended, aim, before, broken)
                if ended.code in (0, None) or aim is None:
                    break
                self.kills[name, f"SIG{aim.signal} of {aim.victim}"] += 1
                done, mine = done + 1, mine + 1
                tell()
            self.settle(run, out, work, mine)
            shutil.rmtree(out, ignore_errors=True)

    def _command(self, work: Work, out: Path, workers: int, run: str) -> list[str]:
        return work.command(out, workers, run)

    def _variables(self, work: Work) -> dict[str, str]:
        return {**self._environment, **dict(work.environment)}

    def _aim(self, work: Work, workers: int) -> Aim:
        chance, whole = self._chance, self._whole[work.name, workers]
        victims = [one for one in work.victims if one != "worker" or workers > 1 or work.name == "slurm"]
        victim = chance.choice(victims)
        sent = chance.choice(_SIGNALS[victim])
        if victim == "worker" or chance.random() < 0.5:
            return Aim(victim, sent, seconds=chance.uniform(0.1 if victim == "worker" else 0, whole.seconds))
        return Aim(victim, sent, touch=chance.randint(1, whole.touches))

    def judge(
        self, run: str, out: Path, work: Work, ended: Ended, aim: Aim | None, before: dict[Path, int],
        broken: dict[str, bytes | None],
    ) -> dict[Path, int]:  # fmt: skip
        """Look at a directory as it was left; returns the records of finished tasks."""
        now, files, truth = records(out), files_of(out), self._truths[work.truth]
        again = [path for path, written in before.items() if now.get(path, written) != written]
        self.lost += [f"{run}: {path.parent.name}/{path.stem} was done again" for path in again]
        self.hangs += ended.code is None
        if not _expected(ended, aim):
            self.lost.append(f"{run} ({aim}) ends with {ended.code}: {self._starter.said()}")
        elif "Traceback" in self._starter.said() and not (aim and aim.signal == "KILL"):
            self.lost.append(f"{run} ({aim}) ends with a traceback: {self._starter.said()}")
        self._starter.log.write_text("")
        for name in list(broken):  # mended once, mended for good
            if files.get(name) == truth[name]:
                del broken[name]
        wrong = [name for name, content in files.items() if content != truth.get(name) and broken.get(name) != content]
        if "manifest.json" in files:
            wrong += [name for name in truth if name not in files and broken.get(name, b"") is not None]
        self.silent += [f"{run} ({aim}): {name} is not as it should be" for name in wrong]
        return now

    def settle(self, run: str, out: Path, work: Work, kills: int) -> None:
        """Look at a finished run: the same bytes as undisturbed, and nothing left behind."""
        if files_of(out) != self._truths[work.truth]:
            self.silent.append(f"{run}: finished, it has other files than the undisturbed one")
        self.lost += [f"{run}: {complaint}" for complaint in work.settle(run, kills)]
        deadline = time.monotonic() + GRACE
        while left_running() and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left_running():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            self.silent.append(f"{run}: process {pid} is left behind: {command[:200]}")
            os.kill(pid, signal.SIGKILL)
        left = [out / ".work", *out.glob(".*.tmp"), *self._starter.temporary.iterdir(), *self._starter.here.iterdir()]
        left += [path for path in out.rglob("*") if path.is_dir() and not any(path.iterdir())]
        for path in left:
            if path.exists():
                self.silent.append(f"{run}: {path} is left behind")
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _expected(ended: Ended, aim: Aim | None) -> bool:
    """Whether a command ended as one that was hit so: by the signal, with its code, or finished before it."""
    if ended.code in (0, None):
        return True
    if aim is None or not ended.hit:
        return False
    number = getattr(signal, f"SIG{aim.signal}")
    if aim.victim == "worker":
        return 0 < ended.code < 128 and ended.code != 1
    return ended.code == -number or (number != signal.SIGKILL and ended.code in (128 + number, 6))


def start_server() -> tuple[int, str]:
    """The stand-in for a model's server in a process of its own; returns its id and URL."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            serve(writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        return pid, f"http://127.0.0.1:{file.read()}"


@contextlib.contextmanager
def a_ray(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray of this machine that outlives the builds on it; yields the variables that lead there."""
    process = subprocess.Popen(
        [sys.executable, "-c", _RAY, str(folder / "ray")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        lines = (line.strip() for line in process.stdout)
        yield {"RAY_ADDRESS": next(line.removeprefix("address ") for line in lines if line.startswith("address "))}
    finally:
        process.stdin.close()
        process.wait(60)


def shares(kills: int, names: list[str]) -> dict[str, int]:
    """How many kills each kind gets."""
    total = sum(SHARES.get(name, 3) for name in names)
    found = {name: kills * SHARES.get(name, 3) // total for name in names}
    found[names[0]] += kills - sum(found.values())
    return found


def _import_all() -> None:
    """Once, for all commands."""
    import aiohttp
    import fasttext
    import pyarrow.parquet
    import tokenizers
    import zstandard

    import megatron_octo.cli.root
    import megatron_octo.data.clean.files
    import megatron_octo.data.curate.run
    import megatron_octo.data.engine.build
    import megatron_octo.data.engine.jobs
    import megatron_octo.data.index.train_tokenizer

    assert aiohttp and fasttext and pyarrow and tokenizers and zstandard and megatron_octo
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork copies no threads


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="how many commands to kill (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few kills")
    parser.add_argument("--only", help="kinds, separated by commas: " + ", ".join([*SHARES, "ray"]))
    parser.add_argument("--ray", action="store_true", help="also builds on a Ray of this machine")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where runs are written")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills is at least 1")
    if not options.scratch.is_dir():
        parser.error(f"--scratch {options.scratch}: no such directory")
    known = [*SHARES, *(["ray"] if options.ray else [])]
    names = options.only.split(",") if options.only else list(QUICK) if options.quick else known
    if unknown := set(names) - {*SHARES, "ray"}:
        parser.error(f"--only {unknown.pop()}: the kinds are {', '.join([*SHARES, 'ray'])}")
    options.shares = QUICK if options.quick and not options.only else shares(options.kills, names)
    return options


def main() -> int:
    """Parse, kill, print; 1 if anything was lost, silently wrong, or hung."""
    options, began = _options(), time.monotonic()
    server, url = start_server()
    _import_all()
    from megatron_octo.progress import Progress

    try:
        with tempfile.TemporaryDirectory(prefix="kb", dir=options.scratch) as scratch, contextlib.ExitStack() as stack:
            more = stack.enter_context(a_ray(Path(scratch))) if "ray" in options.shares else {}
            storm = Storm(Path(scratch), options.seed, url, more)
            storm.learn(list(options.shares), options.quick)
            with Progress("kills", sum(options.shares.values()), "kills", lines=True) as bar:
                for name, kills in options.shares.items():
                    storm.run(name, kills, lambda: bar.advance(1, lost=len(storm.lost), silent=len(storm.silent)))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    return report(storm, options.seed, time.monotonic() - began)


def report(storm: Storm, seed: int, seconds: float) -> int:
    """Print the table, what was found, and the object of the figures; returns the exit code."""
    hits = sorted({how for _, how in storm.kills})
    width = max(map(len, hits), default=0)
    print(f"{'':14}{'runs':>6}{'kills':>7}  " + "  ".join(f"{how:>{width}}" for how in hits))
    for name, runs in storm.runs.items():
        row = [storm.kills[name, how] for how in hits]
        print(f"{name:14}{runs:6}{sum(row):7}  " + "  ".join(f"{count or '-':>{width}}" for count in row))
    for kind, found in (("lost", storm.lost), ("silent", storm.silent)):
        for what in found:
            print(f"{kind}: {what}")
    print(f"{storm.runs.total()} runs brought to their end in {seconds:.0f} s, seed {seed}")
    figures = {"kills": storm.kills.total(), "lost": len(storm.lost), "silent": len(storm.silent)}
    by_kind = {name: sum(count for (kind, _), count in storm.kills.items() if kind == name) for name in storm.runs}
    print(json.dumps({**figures, "hangs": storm.hangs, "runs": storm.runs.total(), "seed": seed, "by_kind": by_kind}))
    return int(any((storm.lost, storm.silent, storm.hangs)))


if __name__ == "__main__":
    sys.exit(main())

"""Kills real data builds with SIGKILL at seeded moments, over and over, and proves that nothing is lost.

Every build is a whole one, forked from a process that has the imports behind it, in one process or with two workers.
A kill hits the process that was started or one of its workers, at a moment of the clock or at the n-th thing done to a
file. After each kill the directory is looked at as it was left, and the same build is started again, until it is whole.

    python tools/kill_builds.py --quick                 a smoke run of a few kills
    python tools/kill_builds.py --kills 200 --seed 1    the long one

What would count as *lost*: a finished task that is done again, a build that refuses to go on. As *silent*: a published
file that differs from an undisturbed build's, or a manifest beside files that are not there. As a *hang*: a build that
does not end. The last line is one JSON object; the exit code is 1 if any of the three is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 60.0  # seconds after which a build that has not ended hangs
CORPORA, LINES = 6, 120
_TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Aim(NamedTuple):
    """What dies, and when: seconds after the start, or at the n-th touch of a file of the build."""

    victim: str  # "build" or "worker"
    seconds: float | None = None
    touch: int | None = None


class Ended(NamedTuple):
    how: str  # killed, done, refused, hung
    seconds: float
    touches: int


def write_inputs(folder: Path) -> Any:
    """Some corpora of a few short lines; returns the build's configuration."""
    from megatron_octo.config.data import DataBuildConfig
    from megatron_octo.config.load import parse_config

    chance, names = random.Random(7), [f"part{number}" for number in range(CORPORA)]
    for name in names:
        rows = [{"text": " ".join(str(chance.randint(1, 9999)) for _ in range(60))} for _ in range(LINES)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpora = {name: {"path": str(folder / f"{name}.jsonl")} for name in names}
    values = {"tokenizer": {"train": {"vocabulary_size": 300, "documents": 20}}, "corpora": corpora}
    return parse_config(DataBuildConfig, values, "kill_builds")


class Builds:
    """Starts builds, kills as told, and waits for them."""

    def __init__(self, config: Any, log: Path) -> None:
        self._config, self._log = config, log

    def build(self, out: Path, workers: int, aim: Aim | None = None) -> Ended:
        """One build from its start to its end."""
        reading, writing = os.pipe()
        began = time.monotonic()
        pid = self._fork(out, workers, aim.touch if aim else None, writing)
        os.close(writing)
        due = None if aim is None or aim.seconds is None else began + aim.seconds
        code = None
        while code is None and time.monotonic() < began + PATIENCE:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
            elif due is not None and time.monotonic() >= due:
                due = None
                for victim in [pid] if aim is None or aim.victim == "build" else _children(pid)[:1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
            time.sleep(0.001)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with os.fdopen(reading) as file:
            touches = int(file.read() or 0)
        how = {None: "hung", 0: "done", -signal.SIGKILL: "killed", 7: "killed"}.get(code, "refused")
        return Ended(how, time.monotonic() - began, touches)

    def _fork(self, out: Path, workers: int, last: int | None, writing: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            from megatron_octo.data.engine.build import build_data
            from megatron_octo.errors import OctoError

            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            counted = count_touches(str(out), last)
            try:
                build_data(self._config, out, workers)
                code = 0
            except OctoError as error:
                print(error, file=sys.stderr, flush=True)
                code = error.exit_code
            os.write(writing, str(counted[0]).encode())
        finally:
            os._exit(code)


def count_touches(folder: str, last: int | None) -> list[int]:
    """Count what this process does to files of a folder, and kill it before it does the `last` of them."""
    count = [0]

    def touch(event: str, arguments: tuple) -> None:
        if event in _TOUCHES and str(arguments[0]).startswith(folder):
            count[0] += 1
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touch)
    return count


def _children(pid: int) -> list[int]:
    """Worker processes of a build, in a seeded caller's hands any order will do."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    except OSError:
        return []


def published(out: Path) -> dict[str, bytes]:
    """Every file in its place."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock" and ".work" not in path.relative_to(out).parts
    }


def records(out: Path) -> dict[Path, int]:
    """Records of finished tasks, and when each was written."""
    found = {}
    for path in (out / ".work" / "records").rglob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # the last moments of a worker that outlives its build
            found[path] = path.stat().st_mtime_ns
    return found


class Storm:
    """Kills until enough have been killed, and keeps the count."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._chance = folder, random.Random(seed)
        self._builds = Builds(write_inputs(folder), folder / "log.txt")
        self.kills: Counter[str] = Counter()
        self.lost: list[str] = []
        self.silent: list[str] = []
        self.hangs = self.runs = 0
        self._whole = {workers: self._undisturbed(workers) for workers in (1, 2)}
        self._truth = published(folder / "whole-1")
        if published(folder / "whole-2") != self._truth:
            raise SystemExit("two workers build other bytes than one")

    def _undisturbed(self, workers: int) -> Ended:
        ended = self._builds.build(self._folder / f"whole-{workers}", workers)
        if ended.how != "done":
            raise SystemExit(f"the undisturbed build {ended.how}:\n{(self._folder / 'log.txt').read_text()[-2000:]}")
        return ended

    def run(self, kills: int, tell: Any) -> None:
        """Build directories one after the other, each killed until it is whole."""
        while self.kills.total() < kills:
            self.runs += 1
            out, before = self._folder / f"run-{self.runs}", {}
            while True:
                workers = self._chance.choice((1, 2))
                aim = self._aim(workers) if self.kills.total() < kills else None
                ended = self._builds.build(out, workers, aim)
                before = self._judge(out, ended, before)
                if ended.how != "killed" or aim is None:
                    break
                self.kills[f"{aim.victim} of {workers}"] += 1
                tell()
            if published(out) != self._truth:
                self.silent.append(f"{out.name}: the finished build has other files than the undisturbed one")
            shutil.rmtree(out)

    def _aim(self, workers: int) -> Aim:
        chance, whole = self._chance, self._whole[workers]
        if workers > 1 and chance.random() < 0.4:
            return Aim("worker", seconds=chance.uniform(0.1, whole.seconds))
        if chance.random() < 0.5:
            return Aim("build", seconds=chance.uniform(0, whole.seconds))
        return Aim("build", touch=chance.randint(1, whole.touches))

    def _judge(self, out: Path, ended: Ended, before: dict[Path, int]) -> dict[Path, int]:
        """Look at the directory as it was left; returns the records of finished tasks."""
        now, files = records(out), published(out)
        again = [path for path, written in before.items() if now.get(path, written) != written]
        self.lost += [f"{out.name}: {path.parent.name}/{path.stem} was done again" for path in again]
        self.hangs += ended.how == "hung"
        if ended.how == "refused":
            self.lost.append(f"{out.name} does not go on: {(self._folder / 'log.txt').read_text()[-500:]}")
        wrong = [name for name, content in files.items() if content != self._truth.get(name)]
        if "manifest.json" in files and files.keys() != self._truth.keys():
            wrong.append("manifest.json")
        self.silent += [f"{out.name}: {name} is in its place and not as it should be" for name in wrong]
        return now


def main() -> int:
    """Parse, kill, print; 1 if anything was lost, silently wrong, or hung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many builds to kill (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few kills")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where builds are written")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills is at least 1")
    if not options.scratch.is_dir():
        parser.error(f"--scratch {options.scratch}: no such directory")
    import tokenizers  # noqa: F401

    import megatron_octo.data.engine.build  # noqa: F401  once, for all builds
    import megatron_octo.data.index.train_tokenizer  # noqa: F401
    from megatron_octo.progress import Progress

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork copies no threads
    began, kills = time.monotonic(), min(options.kills, 8) if options.quick else options.kills
    with tempfile.TemporaryDirectory(prefix="kill_builds_", dir=options.scratch) as scratch:
        storm = Storm(Path(scratch), options.seed)
        with Progress("kills", kills, "kills") as bar:
            storm.run(kills, lambda: bar.advance(1, lost=len(storm.lost), silent=len(storm.silent), hangs=storm.hangs))
    for what, count in sorted(storm.kills.items()):
        print(f"{count:5} kills of the {what.replace('of 1', 'in one process').replace('of 2', 'with two workers')}")
    for kind, found in (("lost", storm.lost), ("silent", storm.silent)):
        for what in found:
            print(f"{kind}: {what}")
    print(f"{storm.runs} builds brought to their end in {time.monotonic() - began:.0f} s, seed {options.seed}")
    figures = {"kills": storm.kills.total(), "lost": len(storm.lost), "silent": len(storm.silent)}
    print(json.dumps({**figures, "hangs": storm.hangs, "runs": storm.runs, "seed": options.seed}))
    return int(any((storm.lost, storm.silent, storm.hangs)))


if __name__ == "__main__":
    sys.exit(main())

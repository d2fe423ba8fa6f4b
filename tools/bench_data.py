"""What the data engine costs on a CPU: beside datatrove and Megatron-LM, per worker, and when it is read for training.

    python tools/bench_data.py --quick                             a smoke run of seconds, figures without meaning
    python tools/bench_data.py                                     the figures of the readme, about twenty minutes
    python tools/bench_data.py --megatron-lm ~/Megatron-LM         the same, beside its tools/preprocess_data.py too

The last line is one JSON object:

tokens_per_cpu_s_vs_datatrove: tokens per CPU second of `octo data build`, over datatrove's JsonlReader and
    MegatronDocumentTokenizer. Both from one JSONL file to `.bin` and `.idx`, one process on one core, CPU seconds of
    the whole process tree, less those of the same program on two documents. Ours hashes its input and its result too.
tokens_per_cpu_s_vs_megatron_lm: the same over Megatron-LM's preprocess_data.py, one worker; null without a checkout.
worker_rss_mib: peak resident memory of the process that tokenises, on the whole corpus four times over.
rss_growth_mib: how much of that is more than on the corpus once.
scaling_2_workers: wall seconds with one worker over those with two, on eight corpora of eight times the size, where a
    worker's start (a second) counts little; wants two idle cores.
startup_s: CPU seconds of `octo data build` on two documents.
blend_index_s: wall seconds to open a blend of three sources with ten million documents for the first time.
windows_vs_memmap: MB per second of 10^5 windows of that blend in random order, over those of a raw memmap of as many
    windows from the same files. `window_mb_s` and `memmap_mb_s` are the two. A window of the blend is put together from
    fifty shuffled documents by Megatron's own dataset, one of the memmap is one stretch: the dearest case there is.

The corpus is made here: seeded, an invented vocabulary in Zipf's proportions, numbers and formulas. The tokenizer is
trained on more of it, byte-level BPE of Llama 3's cut and size, once for all runs with the same --scratch. Rounds are
interleaved, in an order that turns; ratios are taken within a round, then their median. The three `.bin` of a round
must be equal to the byte, and so must the `.idx`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

FIGURES = (
    "tokens_per_cpu_s_vs_datatrove", "tokens_per_cpu_s_vs_megatron_lm", "worker_rss_mib", "rss_growth_mib",
    "scaling_2_workers", "startup_s", "blend_index_s", "windows_vs_memmap", "window_mb_s", "memmap_mb_s",
)  # fmt: skip
PARTS = ("tokenise", "memory", "scaling", "blend")
END = "<|end_of_text|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SIZES: dict[bool, dict[str, int]] = {
    False: {
        "megabytes": 16,
        "long": 128,
        "training": 60,
        "vocabulary": 128_256,
        "documents": 10_000_000,
        "windows": 100_000,
    },
    True: {"megabytes": 1, "long": 1, "training": 1, "vocabulary": 2_000, "documents": 20_000, "windows": 2_000},
}
"""Corpus, that of scaling and training text in MB, entries of the tokenizer, documents and windows of the blend."""
SEQUENCE, DOCUMENT = 2048, 40  # tokens of a window, and of a document of the blend on average


@dataclass(frozen=True)
class Cost:
    """What one process tree cost: wall and CPU seconds, and the peak memory of its largest process in MiB."""

    wall: float
    cpu: float
    peak: float


# -- the corpus

_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr r s sc sh sk sl sp st str t th tr v w"
_NUCLEI = "a ai e ea ee i ie o oa oo u ia"
_CODAS = "- - - ck d l ld m n nd ng nt p r rd rm s ss st t th x"
_ENDINGS = "- - - s ed ing tion ity ive al ous ly able ment ness"
_FORMULAS = (
    r"\frac{{{a}}}{{{b}}}", r"{x}^{{{a}}} + {b}{y} = {c}", r"\sqrt{{{a} + {x}^2}}", "{a} + {b} = {c}",
    r"\int_{{{a}}}^{{{b}}} {x}^{{{c}}} \, d{x}", r"\sum_{{{x}=1}}^{{{a}}} \frac{{{b}}}{{{x}^{c}}}",
    r"\begin{{pmatrix}} {a} & {b} \\ {c} & {x} \end{{pmatrix}}", r"{x}_{{{a}}} \leq \log_{{{b}}} {c}",
    r"\lim_{{{x} \to \infty}} \left(1 + \frac{{{a}}}{{{x}}}\right)^{{{b}}}", r"{a} \times {b} = {c}",
)  # fmt: skip


class Corpus:
    """Documents of an invented language with mathematics in it; one seed, one text."""

    def __init__(self, seed: int, words: int = 150_000) -> None:
        lexicon = random.Random("lexicon")
        self._words = list(dict.fromkeys(self._word(lexicon) for _ in range(words)))
        shares = 1 / (np.arange(len(self._words)) + 3.7) ** 1.05
        self._ends = np.cumsum(shares / shares.sum())
        self._chance, self._numbers = random.Random(seed), np.random.default_rng(seed)

    def write(self, path: Path, megabytes: float) -> int:
        """Fill a JSONL file; returns its documents."""
        size = documents = 0
        with path.open("w", encoding="utf-8") as file:
            while size < megabytes * 1e6:
                size += file.write(json.dumps({"text": self.document()}, ensure_ascii=False) + "\n")
                documents += 1
        return documents

    def document(self) -> str:
        """A few paragraphs and displayed formulas."""
        chance = self._chance
        parts = [
            " ".join(self._sentence() for _ in range(chance.randint(1, 6)))
            if chance.random() < 0.8
            else f"\\[\n  {self._formula()}\n\\]"
            for _ in range(max(1, int(chance.lognormvariate(1.3, 0.8))))
        ]
        return ("\n\n" if chance.random() < 0.7 else "\n").join(parts)

    def _sentence(self) -> str:
        chance = self._chance
        places = np.searchsorted(self._ends, self._numbers.random(chance.randint(5, 24)))
        words = [self._words[place] for place in np.minimum(places, len(self._words) - 1)]
        words[0] = words[0].capitalize()
        inserted = [f"${self._formula()}$" for _ in range(chance.randint(0, 2))]
        if chance.random() < 0.3:
            inserted.append(chance.choice((str(chance.randint(0, 99_999)), "≤", "café", "—")))
        for word in inserted:
            words.insert(chance.randrange(1, len(words)), word)
        return " ".join(words) + chance.choice("...?:")

    def _formula(self) -> str:
        chance = self._chance
        return chance.choice(_FORMULAS).format(
            a=chance.randint(0, 10 ** chance.randint(1, 6)), b=chance.randint(2, 99), c=chance.randint(0, 9999),
            x=chance.choice("xyzntk"), y=chance.choice("abpqrs"),
        )  # fmt: skip

    @staticmethod
    def _word(chance: random.Random) -> str:
        parts = [_ONSETS, _NUCLEI, _CODAS] * chance.choice((1, 1, 2, 2, 2, 3, 3, 4)) + [_ENDINGS]
        return "".join(chance.choice(part.split()) for part in parts).replace("-", "")


def make_tokenizer(directory: Path, megabytes: int, vocabulary: int) -> None:
    """Train byte-level BPE with the cut of Llama 3."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    Corpus(1).write(directory / "training.jsonl", megabytes)
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    marks = [END, "<|begin_of_text|>", *(f"<|reserved_{number}|>" for number in range(254))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(marks), initial_alphabet=alphabet, show_progress=False)
    with (directory / "training.jsonl").open(encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "training.jsonl").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": marks[1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


# -- the programs that are compared, each from a JSONL file to PREFIX.bin and PREFIX.idx


def octo(file: Path, tokenizer: Path, out: Path, workers: int = 1, copies: int = 1) -> tuple[Cost, Path]:
    """`octo data build` of one file, or of as many copies of it as corpora."""
    import yaml

    out.mkdir(parents=True)
    files = [file, *(Path(shutil.copy(file, out / f"c{number}.jsonl")) for number in range(1, copies))]
    corpora = {f"c{number}": {"path": str(path)} for number, path in enumerate(files)}
    config = {"tokenizer": {"path": str(tokenizer)}, "corpora": corpora}
    (out / "mix.yaml").write_text(yaml.safe_dump(config))
    octo = [sys.executable, "-c", "from megatron_octo.cli.root import main; main()", "data", "build"]
    command = [*octo, str(out / "mix.yaml"), "--out", str(out / "data"), "--workers", str(workers)]
    return timed(command, {}), out / "data" / "c0"


def datatrove(file: Path, tokenizer: Path, out: Path) -> tuple[Cost, Path]:
    """datatrove's reader and its writer of Megatron's format, in one process of its own."""
    out.mkdir(parents=True)
    return timed(
        [sys.executable, __file__, "--datatrove", str(file), str(tokenizer), str(out)], {}
    ), out / "00000_tokens"


def run_datatrove(file: Path, tokenizer: Path, out: Path) -> None:
    """What the process of `datatrove` does."""
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    reader = JsonlReader(str(file.parent), glob_pattern=file.name)
    writer = MegatronDocumentTokenizer(str(out), None, str(tokenizer / "tokenizer.json"), END)
    writer.run(reader.run(), 0, 1)


def megatron_lm(checkout: Path, file: Path, tokenizer: Path, out: Path, *options: str) -> tuple[Cost, Path]:
    """tools/preprocess_data.py of a Megatron-LM checkout (core_v0.16.1 was tried), one worker.

    The tool imports kernels that need triton and does not use them: where there is none, an empty module stands in.
    """
    out.mkdir(parents=True)
    absent = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
    (out / "sitecustomize.py").write_text(
        "import importlib.util, sys, types\n"
        "if importlib.util.find_spec('triton') is None:\n"
        f"    module = sys.modules['{absent}'] = types.ModuleType('{absent}')\n"
        "    def unused(name):\n"
        "        if name.startswith('__'):\n"
        "            raise AttributeError(name)\n"
        "        return lambda *arguments, **named: None\n"
        "    module.__getattr__ = unused\n"
    )
    options = options or ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer))
    command = [sys.executable, "-W", "ignore", str(checkout / "tools" / "preprocess_data.py"), "--input", str(file)]
    command += ["--output-prefix", str(out / "text"), "--append-eod", "--workers", "1", *options]
    return timed(command, {"PYTHONPATH": str(out)}), out / "text_text_document"


def timed(command: list[str], changes: dict[str, str]) -> Cost:
    """Run a command to its end on one thread a process; a failure ends the benchmark with its last words."""
    threads = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as told:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, **threads, **changes})
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise SystemExit(f"{' '.join(command[:4])} ... ended with {process.returncode}:\n{told.read()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


# -- what is measured


Program = Callable[[Path, Path, Path], tuple[Cost, Path]]


def compare(programs: dict[str, Program], folder: Path, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """Tokens per CPU second of each program, round by round, and what each costs on two documents."""
    two, whole = folder / "two.jsonl", folder / "corpus.jsonl"
    found: dict[str, Any] = {name: {"rates": [], "starts": [], "peaks": []} for name in programs}
    for turn in range(rounds):
        files = []
        names = list(programs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, _ = programs[name](two, tokenizer, folder / f"{turn}-{name}-two")
            cost, prefix = programs[name](whole, tokenizer, folder / f"{turn}-{name}")
            files.append([Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx")])
            tokens = len(files[-1][0]) // stored_bytes(files[-1][1])
            found[name]["rates"].append(tokens / max(cost.cpu - start.cpu, 1e-3))
            found[name]["starts"].append(start.cpu)
            found[name]["peaks"].append(cost.peak)
        if any(pair != files[0] for pair in files):
            raise SystemExit(f"the files of {', '.join(names)} differ")
        for name in names:
            for path in (folder / f"{turn}-{name}", folder / f"{turn}-{name}-two"):
                shutil.rmtree(path)
    return found


def stored_bytes(index: bytes) -> int:
    """Bytes of a stored token, by the index's own header."""
    return {4: 4, 8: 2}[index[17]]


def measure_memory(folder: Path, tokenizer: Path) -> tuple[float, float]:
    """Peak MiB of our process on a corpus four times as long, and what that is more than on the corpus itself."""
    long = folder / "long.jsonl"
    with long.open("wb") as file:
        for _ in range(4):
            file.write((folder / "corpus.jsonl").read_bytes())
    peaks = [octo(path, tokenizer, folder / f"memory-{path.stem}")[0].peak for path in (folder / "corpus.jsonl", long)]
    return peaks[1], peaks[1] - peaks[0]


def measure_scaling(folder: Path, tokenizer: Path, megabytes: int, rounds: int) -> tuple[list[float], list[float]]:
    """What two workers cost less than one in wall seconds, and more in CPU seconds, round by round, as ratios."""
    Corpus(3).write(folder / "scaling.jsonl", megabytes)
    walls, cpus = [], []
    for turn in range(rounds):
        costs = {}
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            out = folder / f"scaling-{workers}"
            costs[workers] = octo(folder / "scaling.jsonl", tokenizer, out, workers, copies=8)[0]
            shutil.rmtree(out)
        walls.append(costs[1].wall / costs[2].wall)
        cpus.append(costs[2].cpu / costs[1].cpu)
    return walls, cpus


def measure_blend(folder: Path, documents: int, windows: int) -> dict[str, float]:
    """Open a blend of three sources for the first time, then read windows of it, and as many from raw memmaps."""
    from megatron_octo.config.mixture import DataConfig
    from megatron_octo.data.index.pairs import bin_path
    from megatron_octo.data.mix.reader import build_train_dataset

    vocabulary, parts, mixture = 32_000, {"a": 0.6, "b": 0.3, "c": 0.1}, {}
    for number, (name, share) in enumerate(parts.items()):
        write_random(folder / name, int(documents * share), vocabulary, number)
        mixture[name] = {"path": str(folder / name), "weight": share}
    data = DataConfig(tokenizer=folder, mixture=mixture, sequence_length=SEQUENCE)
    total = int(documents * DOCUMENT / SEQUENCE * 0.95)
    began = time.monotonic()
    dataset = build_train_dataset(data, total, folder / "cache")
    opened = time.monotonic() - began
    chosen = np.random.default_rng(0).integers(total, size=windows)
    length = SEQUENCE + 1

    def ours() -> None:
        for place in chosen.tolist():
            dataset[place]

    raw = [np.memmap(bin_path(folder / name), np.uint16, "r") for name in parts]

    def mapped() -> None:
        for place in chosen.tolist():
            tokens = raw[place % 3]
            start = place * 7919 % (len(tokens) - length)
            np.array(tokens[start : start + length])

    seconds: dict[str, list[float]] = {"ours": [], "mapped": []}
    for _ in range(3):
        for name, read in (("ours", ours), ("mapped", mapped)):
            began = time.monotonic()
            read()
            seconds[name].append(time.monotonic() - began)
    megabytes = windows * length * 2 / 1e6
    rates = {name: megabytes / median(values) for name, values in seconds.items()}
    ratio = median(b / a for a, b in zip(seconds["ours"], seconds["mapped"], strict=True))
    return {
        "blend_index_s": opened, "windows_vs_memmap": ratio,
        "window_mb_s": rates["ours"], "memmap_mb_s": rates["mapped"],
    }  # fmt: skip


def write_random(prefix: Path, documents: int, vocabulary: int, seed: int) -> None:
    """A pair of random tokens in documents of random length."""
    from megatron_octo.data.index.writer import IndexedWriter

    chance = np.random.default_rng(seed)
    with IndexedWriter(prefix, vocabulary) as writer:
        for first in range(0, documents, 100_000):
            lengths = chance.integers(1, 2 * DOCUMENT, min(100_000, documents - first))
            tokens = chance.integers(vocabulary, size=int(lengths.sum()), dtype=np.uint16)
            writer.write(tokens.tobytes(), lengths.tolist(), np.bincount(tokens, minlength=vocabulary))
        writer.publish()


# -- the report


def table(found: dict[str, Any]) -> str:
    """Medians and spread of each program."""
    lines = [f"{'':24} {'tokens per CPU second':>36} {'start-up CPU s':>16} {'peak MiB':>10}"]
    for name, facts in found.items():
        rates = sorted(facts["rates"])
        shown = f"{median(rates):,.0f} ({rates[0]:,.0f}-{rates[-1]:,.0f})"
        lines.append(f"{name:24} {shown:>36} {median(facts['starts']):16.2f} {median(facts['peaks']):10.0f}")
    return "\n".join(lines)


def ratio(found: dict[str, Any], peer: str) -> float | None:
    """Our tokens per CPU second over a peer's: the median of the rounds' ratios."""
    if peer not in found:
        return None
    pairs = zip(found["octo"]["rates"], found[peer]["rates"], strict=True)
    return round(median(ours / theirs for ours, theirs in pairs), 2)


def machine() -> str:
    """What the figures were taken on."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, load {load:.2f}"


def main() -> None:
    """Parse, measure, print."""
    args = _parse()
    if args.tokenizer:
        make_tokenizer(Path(args.tokenizer[0]), *map(int, args.tokenizer[1:]))
        return
    if args.datatrove:
        run_datatrove(*map(Path, args.datatrove))
        return
    sizes = SIZES[args.quick]
    print(machine(), flush=True)
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    tokenizer = args.scratch / f"bench_data_tokenizer_{sizes['vocabulary']}"
    if not (tokenizer / "tokenizer_config.json").exists():  # not here: a child's peak memory counts its parent's
        numbers = [str(sizes[name]) for name in ("training", "vocabulary")]
        cost = timed([sys.executable, __file__, "--tokenizer", str(tokenizer), *numbers], {})
        print(f"tokenizer of {sizes['vocabulary']} entries trained in {cost.cpu:.0f} CPU s", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench_data_", dir=args.scratch) as scratch:
        folder = Path(scratch)
        Corpus(2).write(folder / "corpus.jsonl", sizes["megabytes"])
        with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
            (folder / "two.jsonl").write_text(file.readline() + file.readline(), encoding="utf-8")
        if "tokenise" in args.only:
            programs: dict[str, Program] = {"octo": octo, "datatrove": datatrove}
            if args.megatron_lm:
                programs["megatron_lm"] = lambda *paths: megatron_lm(args.megatron_lm, *paths)
            found = compare(programs, folder, tokenizer, args.rounds)
            print(table(found), flush=True)
            for peer in ("datatrove", "megatron_lm"):
                figures[f"tokens_per_cpu_s_vs_{peer}"] = ratio(found, peer)
            figures["startup_s"] = median(found["octo"]["starts"])
        if "memory" in args.only:
            figures["worker_rss_mib"], figures["rss_growth_mib"] = measure_memory(folder, tokenizer)
        if "scaling" in args.only:
            walls, cpus = measure_scaling(folder, tokenizer, sizes["long"], args.rounds)
            for kind, values in (("faster", walls), ("CPU seconds", cpus)):
                print(f"two workers over one, {kind}: {median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
            figures["scaling_2_workers"] = median(walls)
        if "blend" in args.only:
            figures |= measure_blend(folder, sizes["documents"], sizes["windows"])
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    print(json.dumps({name: value if value is None else round(value, 2) for name, value in figures.items()}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="of each program (default: 5)")
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM to compare with")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where to make the files")
    parser.add_argument("--quick", action="store_true", help="a tiny corpus, one round")
    parser.add_argument("--datatrove", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    if not args.scratch.is_dir():
        parser.error(f"--scratch {args.scratch}: no such directory")
    if args.megatron_lm and not (args.megatron_lm / "tools" / "preprocess_data.py").is_file():
        parser.error(f"--megatron-lm {args.megatron_lm}: no checkout of Megatron-LM")
    return args


if __name__ == "__main__":
    main()

"""A fastText classifier that learns the judge's verdict, and how well it does on documents it has not seen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.curate import Train
from megatron_octo.data.curate.fit import NO_WORDS, NOT_A_NUMBER
from megatron_octo.data.curate.judge import JUDGED
from megatron_octo.data.curate.normalize import normalized
from megatron_octo.data.curate.parts import Curation, Part, left, random_number, read_documents
from megatron_octo.data.engine.code import LEARNS, code_of
from megatron_octo.data.engine.stage import Executor, Stage, run_stages
from megatron_octo.errors import DataError, StageFailed
from megatron_octo.files import hash_file, replacing, write_json

FORMAT = 2
TRAIN = "train"
POSITIVE, NEGATIVE = "__label__positive", "__label__negative"

_TRIES = 5  # each at half the rate of the one before
_THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)]


def train_classifier(curation: Curation, parts: list[Part], judged: dict[str, Any], team: Executor) -> dict[str, Any]:
    """Train, measure, leave `classifier/model.bin` and `classifier/report.json` in the result, and say how good it is.

    Returns:
        The report, see `measure`; the model's `sha256`.
    """
    train, judge = curation.config.train, curation.config.judge
    assert train is not None and judge is not None
    made_from = {"format": FORMAT, "train": train.model_dump(mode="json"), "positive_from": judge.positive_from}
    made_from |= {"seed": curation.config.seed, "threshold": _threshold(curation), "code": code_of(LEARNS)}
    hashes = [facts["sha256"] for facts in judged["parts"]]
    stage = Stage(TRAIN, [hashes], partial(learn, curation, [part.number for part in parts]), made_from)
    report = run_stages([stage], curation.work, team)[TRAIN][0]
    print(f"train: {_words(report)}; report: {_report_file(curation)}", file=sys.stderr, flush=True)
    return report


def _words(report: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {report[name]}" for name in ("precision", "recall", "f1", "informedness"))
    held, at = report["held_out"], report["threshold"]
    share = held["positive"] / (held["positive"] + held["negative"])
    return (
        f"of {sum(held.values())} held-out documents, {share:.1%} of them positive, the classifier keeps "
        f"{report['kept']:.1%} at threshold {at}: {figures}"
    )


def refuse_worthless(curation: Curation, report: dict[str, Any]) -> None:
    """Check that a classifier tells positive documents from others, before the corpora are read and models are paid.

    Raises:
        DataError: it does not, or not at the threshold: such a one may keep everything, or nothing.
    """
    classify = curation.config.classify
    assert classify is not None
    if report["informedness"] >= classify.least_informedness:
        return
    best = max(report["curve"], key=lambda point: point["informedness"])
    raise DataError(
        f"the classifier is hardly better than chance: {_words(report)}",
        f"informedness is less than classify.least_informedness = {classify.least_informedness} "
        f"(the best is {best['informedness']}, at threshold {best['threshold']}; see {_report_file(curation)})",
        "set another classify.threshold, draw a larger sample, or train otherwise (train.epochs, train.rate); to go on "
        "all the same: classify.least_informedness: -1",
    )


def _report_file(curation: Curation) -> Path:
    return curation.result / "classifier" / "report.json"


def _threshold(curation: Curation) -> float:
    return curation.config.classify.threshold if curation.config.classify else 0.5


def learn(curation: Curation, numbers: list[int], hashes: list[str]) -> dict[str, Any]:
    """Train a classifier on the judged documents of some shards.

    Raises:
        DataError: one class is missing, or fastText finds no numbers.
    """
    train = curation.config.train
    assert train is not None
    folder = curation.work / TRAIN
    folder.mkdir(parents=True, exist_ok=True)
    counts = write_lines(curation, numbers, folder)
    model = _report_file(curation).with_name("model.bin")
    model.parent.mkdir(parents=True, exist_ok=True)
    with replacing(model) as temporary:
        used = fit(train, folder / "train.txt", temporary, curation.config.seed)
    labels, scores = _held_out(folder / "held_out.txt", model)
    report = {**counts, **used, **measure(labels, scores, _threshold(curation))}
    write_json(_report_file(curation), report)
    for name in ("all.txt", "train.txt", "held_out.txt"):
        (folder / name).unlink()
    return {**report, "sha256": hash_file(model), **left(curation, model, _report_file(curation))}


def write_lines(curation: Curation, numbers: list[int], folder: Path) -> dict[str, Any]:
    """Write what to train on and what to measure on, a labelled line a document.

    Equal texts stand on the same side; which one follows from the seed and the text. Held-out documents keep the shares
    of the classes they have.
    """
    train, judge, seed = curation.config.train, curation.config.judge, curation.config.seed
    assert train is not None and judge is not None
    limit = int(train.held_out * 2**64)
    labels: list[bool] = []
    draws: list[int] = []
    counts = {"held_out": {"positive": 0, "negative": 0}, "without_words": 0}
    with (
        (folder / "all.txt").open("w", encoding="utf-8") as rest,
        (folder / "held_out.txt").open("w", encoding="utf-8") as held,
    ):
        for record in _judged(curation, numbers):
            line = normalized(record["text"])
            if not line:
                counts["without_words"] += 1
                continue
            positive = record["score"] >= judge.positive_from
            if random_number(seed, "held out", line) < limit:
                counts["held_out"]["positive" if positive else "negative"] += 1
                held.write(f"{POSITIVE if positive else NEGATIVE} {line}\n")
                continue
            labels.append(positive)
            draws.append(random_number(seed, "balance", record["id"]))
            rest.write(f"{POSITIVE if positive else NEGATIVE} {line}\n")
    chosen = balanced(np.array(labels, bool), np.array(draws, "<u8"), train.balanced)
    with (
        (folder / "all.txt").open(encoding="utf-8") as lines,
        (folder / "train.txt").open("w", encoding="utf-8") as out,
    ):
        out.writelines(line for line, wanted in zip(lines, chosen.tolist(), strict=True) if wanted)
    found = np.array(labels, bool)
    counts["trained"] = {"positive": int((found & chosen).sum()), "negative": int((~found & chosen).sum())}
    counts["left_out_to_balance"] = int((~chosen).sum())
    _refuse_one_class("to learn from", int(found.sum()), int((~found).sum()))
    _refuse_one_class("to be measured on", **counts["held_out"])
    return counts


def _refuse_one_class(use: str, positive: int, negative: int) -> None:
    if not positive or not negative:
        raise DataError(
            f"the classifier has {positive} positive and {negative} negative documents {use}",
            "it needs both",
            "draw a larger sample (sample.documents_per_year), or change judge.positive_from",
        )


def _judged(curation: Curation, numbers: list[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        yield from read_documents(curation.shard_file(JUDGED, number))


def balanced(labels: np.ndarray, draws: np.ndarray, wanted: bool) -> np.ndarray:
    """Which documents to train on: all, or of the larger class only as many as the smaller one has, drawn at random."""
    chosen = np.ones(len(labels), bool)
    fewer = min(int(labels.sum()), int((~labels).sum()))
    if wanted:
        for side in (True, False):
            members = np.flatnonzero(labels == side)
            chosen[members[np.argsort(draws[members], kind="stable")[fewer:]]] = False
    return chosen


def fit(train: Train, lines: Path, out: Path, seed: int) -> dict[str, Any]:
    """Train fastText in a process of its own, so that with one thread the same lines give the same bytes.

    fastText 0.9.2 with one thread sets only the first tenth of its input matrix and takes the rest as the memory comes:
    whatever was there before, up to numbers that are none. glibc's allocator, told to perturb memory with 255, hands
    out zeros instead.

    Returns:
        `rate`, the learning rate that was used, and `failed_tries` at higher ones.

    Raises:
        DataError: fastText met a number that is none at every rate, or knows no word.
        StageFailed: the process ended in another way.
    """
    settings = {
        "input": str(lines), "out": str(out), "dim": train.dimension, "epoch": train.epochs, "seed": seed % 2**31,
        "wordNgrams": train.word_ngrams, "bucket": train.buckets if train.word_ngrams > 1 else 0, "loss": "softmax",
        "minCount": train.minimum_count, "thread": train.threads, "verbose": 0,
    }  # fmt: skip
    file = lines.with_name("settings.json")
    rates = [train.rate / 2**number for number in range(_TRIES)]
    for failed, rate in enumerate(rates):
        write_json(file, {**settings, "lr": rate})
        done = subprocess.run(
            [sys.executable, "-m", "megatron_octo.data.curate.fit", str(file)],
            env={**os.environ, "MALLOC_PERTURB_": "255"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0:
            return {"rate": rate, "failed_tries": failed}
        if done.returncode == NO_WORDS:
            raise DataError(
                f"no word occurs {train.minimum_count} times in the documents to learn from",
                "the classifier would know nothing",
                "draw a larger sample, or set a lower train.minimum_count",
            )
        if done.returncode != NOT_A_NUMBER:
            words = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
            raise StageFailed(f"the training of the classifier failed: {words}", "it is a process of its own")
    raise DataError(
        f"fastText met a number that is none at every learning rate from {rates[0]:g} down to {rates[-1]:g}",
        "it diverges on these documents",
        "draw a larger sample, or set a lower train.rate or train.dimension",
    )


@lru_cache(maxsize=1)
def _load(path: str, sha256: str) -> Any:
    import fasttext

    return fasttext.load_model(path)


class Classifier:
    """A trained model.

    Args:
        path: its file.
        sha256: its hash; a model is loaded once in a process.

    Raises:
        DataError: it is no model with these labels.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        try:
            self._model = _load(str(path), sha256)
            labels = set(self._model.get_labels())
        except (ValueError, RuntimeError, MemoryError) as error:
            raise DataError(f"{path} is no fastText model ({error})", fix="name another one") from None
        if labels != {POSITIVE, NEGATIVE}:
            raise DataError(
                f"{path} knows the labels {', '.join(sorted(labels))}", f"they must be {POSITIVE} and {NEGATIVE}"
            )

    def probability(self, line: str) -> float:
        """The probability, 0 to 1, that a normalized text is positive; 0 for one without words.

        Raises:
            DataError: the model finds no number.
        """
        if not line:
            return 0.0
        names, values = self._model.predict(line, k=2)
        found = dict(zip(names, values, strict=True)).get(POSITIVE, 0.0)
        if not np.isfinite(found):
            raise DataError("the classifier finds a number that is none", "its weights are broken", "train it anew")
        return float(min(1.0, max(0.0, found)))  # fastText's own softmax may exceed 1 by a little


def _held_out(path: Path, model: Path) -> tuple[np.ndarray, np.ndarray]:
    classifier = Classifier(model, hash_file(model))
    labels, scores = [], []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            label, _, words = line.rstrip("\n").partition(" ")
            labels.append(label == POSITIVE)
            scores.append(classifier.probability(words))
    return np.array(labels, bool), np.array(scores)


def measure(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """How well scores tell positive documents from others.

    Args:
        labels: the judge's verdicts.
        scores: the classifier's probabilities, of the same documents.
        threshold: least probability at which a document is kept.

    Returns:
        `threshold`, `precision`, `recall`, `f1`, `informedness` (Youden's J: share kept of the positive less share kept
        of the other ones) and `kept` (share of all) there; `curve`, the same at every 0.05.
    """
    return {**_at(labels, scores, threshold), "curve": [_at(labels, scores, value) for value in _THRESHOLDS]}


def _at(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    kept = scores >= threshold
    right = int((kept & labels).sum())
    precision = right / kept.sum() if kept.any() else 0.0
    recall = right / labels.sum() if labels.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    wrong = int((kept & ~labels).sum()) / max(1, int((~labels).sum()))
    values = {"precision": precision, "recall": recall, "f1": f1, "informedness": recall - wrong, "kept": kept.mean()}
    return {"threshold": threshold, **{name: round(float(value), 4) for name, value in values.items()}}

"""The classifier's probability for every document of the corpora, and which of them it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from megatron_octo.config.data import expand_path
from megatron_octo.data.corpora.read import Accounts
from megatron_octo.data.curate.normalize import normalized
from megatron_octo.data.curate.parts import Curation, Part, all_left, left, read_shard, total, write_documents
from megatron_octo.data.curate.sample import reading, total_accounts
from megatron_octo.data.curate.train import Classifier
from megatron_octo.data.engine.code import LEARNS, code_of
from megatron_octo.data.engine.stage import Executor, Stage, advance, run_stages
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file, replacing

# datatrove's FastTextClassifierFilter is not used: it hands the model the text it will keep, so the model could only be
# one of raw text, and it writes that text anew from its pieces.

FORMAT = 1
CLASSIFY, KEEP, CORPUS = "classify", "keep", "corpus"

_BINS = 20  # of the histogram of probabilities


def classify_corpora(curation: Curation, parts: list[Part], team: Executor) -> dict[str, Any]:
    """Find the probability of every document.

    Returns:
        `accounts` of reading, `kept`, `below_threshold`, `histogram` of probabilities in twenty bins, `model` as its
        hash, and under `parts` the facts of each shard.
    """
    config = curation.config
    assert config.classify is not None
    named = config.classify.model
    model = named_model(named) if named else curation.result / "classifier" / "model.bin"
    own = {"format": FORMAT, "read": reading(curation), "learned": code_of(LEARNS)}
    sha256 = hash_file(model)
    own |= {"model": sha256, "threshold": config.classify.threshold}
    work = partial(score_shard, curation, model, sha256)
    done = run_stages([Stage(CLASSIFY, parts, work, own, unit="documents")], curation.work, team)[CLASSIFY]
    accounts, kept = total_accounts(done), total(done, "documents")
    histogram = np.sum([fact["histogram"] for fact in done], axis=0).tolist()
    below = accounts["documents"] - kept
    return {
        "accounts": accounts, "kept": kept, "below_threshold": below, "histogram": histogram, "model": sha256,
        "parts": done,
    }  # fmt: skip


def refuse_all_kept(curation: Curation, classified: dict[str, Any]) -> None:
    """Check that a classifier leaves something out, before every document is sent to a model.

    Raises:
        DataError: it keeps more than `classify.most_kept`.
    """
    classify, documents = curation.config.classify, classified["accounts"]["documents"]
    assert classify is not None
    if classified["kept"] > classify.most_kept * documents:
        raise DataError(
            f"the classifier keeps {classified['kept']} of {documents} documents at classify.threshold = "
            f"{classify.threshold}, more than classify.most_kept = {classify.most_kept}",
            "it chooses nothing, and refining is the dearest step",
            "set a higher classify.threshold or mend the classifier; to refine all of them: classify.most_kept: 1",
        )


def named_model(named: Path) -> Path:
    """The classifier's file that `classify.model` names.

    Raises:
        DataError: it is not there.
    """
    path = expand_path(named, "classify.model")
    if not path.is_file():
        raise DataError(f"classify.model: {path} is no file", fix="name a fastText model, or train one")
    return path


def score_shard(curation: Curation, model: Path, sha256: str, part: Part) -> dict[str, Any]:
    """Write the probabilities of a shard's documents, in their order."""
    assert curation.config.classify is not None
    classifier, accounts, scores = Classifier(model, sha256), Accounts(), []
    characters, threshold = 0, np.float32(curation.config.classify.threshold)
    for document in read_shard(curation, part, accounts):
        scores.append(classifier.probability(normalized(document.text)))
        characters += len(document.text) if np.float32(scores[-1]) >= threshold else 0
        advance(1)
    found = np.array(scores, np.float32)
    path = curation.file(CLASSIFY, part.number, ".npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, found)
    return {
        "accounts": accounts.as_json(),
        "documents": int((found >= threshold).sum()),
        "characters": characters,
        "histogram": np.histogram(found, _BINS, (0, 1))[0].tolist(),
        **left(curation, path),
    }


def kept_documents(
    curation: Curation, part: Part, pulse: Callable[[], None] = lambda: None
) -> Iterator[tuple[Document, float | None]]:
    """The documents of a shard that the classifier keeps, with their probabilities; all where there is none.

    Args:
        curation: the curation.
        part: the shard.
        pulse: called for every document that is read, also those that are not kept.
    """
    scores = kept = None
    if curation.config.classify is not None:
        scores = np.load(curation.file(CLASSIFY, part.number, ".npy"))
        kept = scores >= np.float32(curation.config.classify.threshold)
        if not kept.any():
            return
    for place, document in enumerate(read_shard(curation, part)):
        pulse()
        if scores is None or kept is None:
            yield document, None
        elif kept[place]:
            yield document, round(float(scores[place]), 4)


def keep_documents(curation: Curation, parts: list[Part], classified: dict[str, Any], team: Executor) -> dict[str, Any]:
    """Write what the classifier keeps as a corpus: the last step where nothing is refined.

    Returns:
        `documents`, and the files.
    """
    own = {"format": FORMAT, "classified": {name: classified[name] for name in ("model", "accounts", "kept")}}
    classify = curation.config.classify
    assert classify is not None
    own |= {"settings": [classify.model, classify.threshold, curation.config.seed]}
    own |= {"read": reading(curation)}  # the texts: another rendering may have the same counts
    stage = Stage(KEEP, parts, partial(_keep, curation), own)
    done = run_stages([stage], curation.work, team)[KEEP]
    return {"documents": total(done, "documents"), **all_left(done)}


def _keep(curation: Curation, part: Part) -> dict[str, Any]:
    path = curation.shard_file(CORPUS, part.number)
    records = ({"id": found.id, "text": found.text, "score": score} for found, score in kept_documents(curation, part))
    return {**write_documents(path, records), **left(curation, path)}

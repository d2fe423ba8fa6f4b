"""Whatever a corpus holds, every record is accounted for once, and the account does not depend on its parts."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from corpora_tools import config_of, counted  # noqa: E402

from megatron_octo.data.corpora import shard as shard_module  # noqa: E402
from megatron_octo.data.corpora.read import Accounts, ShardReader  # noqa: E402
from megatron_octo.data.corpora.shard import list_shards  # noqa: E402
from megatron_octo.errors import DataError  # noqa: E402

HELD = "what is two plus two"


def good(words: str) -> bytes:
    return json.dumps({"question": f"q {words}", "generated_solution": words or "x", "is_correct": True}).encode()


RECORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
    .filter(lambda text: text.strip())
    .map(lambda text: ("good", good(text))),
    st.just(("unsuitable", b'{"question": "q", "generated_solution": "s", "is_correct": false}')),
    st.just(("heldout", json.dumps({"question": HELD, "generated_solution": "4", "is_correct": True}).encode())),
    st.sampled_from(
        [b"", b"{", b"[]", b'{"question": null, "generated_solution": "", "is_correct": true}', b"\xff", b"\0"]
    ).map(lambda line: ("damaged", line)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(RECORDS, min_size=1, max_size=25),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    part=st.integers(1, 400),
    policy=st.sampled_from(["strict", "skip"]),
    end=st.sampled_from([b"\n", b"\r\n"]),
)
def test_every_record_is_accounted_for(
    records: list[tuple[str, bytes]], suffix: str, part: int, policy: str, end: bytes
) -> None:
    plain, shard_module.PART = shard_module.PART, part
    try:
        with tempfile.TemporaryDirectory() as folder:
            _check(Path(folder), records, suffix, policy, end)
    finally:
        shard_module.PART = plain


def _check(folder: Path, records: list[tuple[str, bytes]], suffix: str, policy: str, end: bytes) -> None:
    content = b"".join(line + end for _, line in records)
    content = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content)
    (folder / f"c.jsonl{suffix}").write_bytes(content)
    (folder / "held.jsonl").write_text(json.dumps({"question": f" {HELD.title()}?", "answer": "4"}) + "\n")
    config = config_of(
        {"c": {"path": str(folder / f"c.jsonl{suffix}"), "adapter": "openmathinstruct-1"}},
        on_bad_line=policy,
        problems={"heldout": {"file": {"path": str(folder / "held.jsonl"), "split": "test"}}},
    )
    total, ids = Accounts(), []
    damaged = [number for number, (kind, _) in enumerate(records, start=1) if kind == "damaged"]
    try:
        for shard in counted(list_shards(config, "c")):
            reader = ShardReader(config, shard)
            for document in reader:
                ids.append(document.id)
                _holds(reader.accounts)  # at any moment
            total += reader.accounts
    except DataError as error:
        assert policy == "strict" and f", line {damaged[0]}: " in str(error)
        return
    _holds(total)
    count = {kind: sum(found == kind for found, _ in records) for kind in ("good", "unsuitable", "heldout", "damaged")}
    assert policy == "skip" or not damaged
    assert (total.read, total.documents) == (len(records), count["good"])
    assert sum(total.skipped.values()) == count["unsuitable"] + count["damaged"]
    assert total.removed == ({"heldout": count["heldout"]} if count["heldout"] else {})
    assert [int(line.split(":")[1]) for line in total.first] == damaged[:20]
    assert [int(found.rpartition(":")[2]) for found in ids] == [
        number for number, (kind, _) in enumerate(records, start=1) if kind == "good"
    ]


def _holds(accounts: Accounts) -> None:
    assert accounts.read == accounts.documents + sum(accounts.skipped.values()) + sum(accounts.removed.values())


COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), max_size=3)


@given(
    st.lists(
        st.builds(Accounts, st.integers(0, 9), st.integers(0, 9), COUNTS, st.lists(st.text(), max_size=30), COUNTS),
        max_size=6,
    )
)
def test_accounts_add_up_in_any_grouping(parts: list[Accounts]) -> None:
    left = sum(parts, Accounts())
    right = Accounts()
    for part in reversed(parts):
        right = part + right
    assert left == right and Accounts(**json.loads(json.dumps(left.as_json()))) == left
    assert left.read == sum(part.read for part in parts)
    assert sum(left.skipped.values()) == sum(sum(part.skipped.values()) for part in parts)


def test_documents_that_turn_out_to_be_none_stay_accounted_for() -> None:
    accounts = Accounts(read=5, documents=5)
    accounts.skip("no tokens", documents=2)
    accounts.remove("leak", documents=1)
    _holds(accounts)
    assert accounts.documents == 2

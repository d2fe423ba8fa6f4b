"""What a data build leaves out: duplicates, and what the benchmarks ask."""

from __future__ import annotations

from pydantic import Field

from megatron_octo.config.base import Strict


class Deduplicate(Strict):
    """Which documents count as the same; the first in the order of corpora, shards and places is kept."""

    exact: bool = Field(default=True, description="texts that agree but for case and white space")
    partitions: int = Field(
        default=16,
        gt=0,
        le=4096,
        description="parts the hashes are cut into: 40 bytes of memory for each of a part",
    )

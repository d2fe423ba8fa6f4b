"""Which code results follow from: part of the key of every record, and of the manifest."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from megatron_octo import __version__
from megatron_octo.errors import EnvironmentProblem

_READS = ("orjson", "pyarrow", "numpy")
CLEANS = (*_READS, "datatrove", "xxhash")
"""Libraries whose change can change what counts as a duplicate or a leak."""
TOKENISES = (*_READS, "tokenizers", "sentencepiece")
"""Libraries whose change can change which tokens a text becomes."""

CURATES = (*CLEANS, "zstandard")
"""Libraries whose change can change which documents a curation draws and keeps, and the bytes they are written in."""
LEARNS = ("numpy", "xxhash", "fasttext-numpy2-wheel")
"""Libraries whose change can change what a classifier learns, and what it finds."""


@lru_cache
def code_of(libraries: tuple[str, ...] = tuple(dict.fromkeys(CLEANS + TOKENISES))) -> dict[str, str]:
    """Versions of this package, of Python, whose tables of characters decide which texts agree, and of libraries.

    Records made by other versions are not believed, so that a build that is stopped, upgraded and started again never
    holds pieces of both.
    """
    return {
        "megatron-octo": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _version(name) for name in libraries},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def refuse_other_code(code: dict[str, str]) -> None:
    """Check that this process runs the versions that a build was started with.

    Raises:
        EnvironmentProblem: it does not; a node of a cluster has other packages.
    """
    own = code_of()
    other = [f"{name} {own.get(name)} instead of {known}" for name, known in code.items() if own.get(name) != known]
    if other:
        raise EnvironmentProblem(
            f"node {platform.node()} runs {', '.join(other)}",
            "the records say which versions made them, and a build is made by one",
            "install the same packages on every node",
        )

"""The files of a corpus: one, a folder, a glob, or a URL that fsspec knows."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_octo.config.data import Corpus, InputFile, Inputs, expand, expand_path, variables_of
from megatron_octo.data.corpora.registry import Adapter, adapter_of
from megatron_octo.errors import DataError

_READABLE = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst|\.zstd)?$|\.parquet$")
_DESCRIBES = re.compile(r"\.json$")
_KINDS = "jsonl, jsonl.gz, jsonl.zst or parquet"
_NAMED = 20


def input_path(file: InputFile, where: str) -> Path:
    """The path of a file of problems, which must be there.

    Args:
        file: its configuration.
        where: the field that names it, for the message.

    Raises:
        DataError: there is no such file; the message says what to download and where to put it.
        ConfigError: the path names an environment variable that is not set.
    """
    path = expand_path(file.path, f"{where}.path")
    if path.is_file():
        return path
    what = f"{where}: {path} {'is a directory' if path.is_dir() else 'does not exist'}"
    raise DataError(what, file.hint, _fix(file.path, str(path)))


def corpus_files(config: Inputs, name: str, adapter: Adapter, revisions: dict[str, str]) -> list[tuple[str, str]]:
    """The files of a corpus in sorted order.

    Args:
        config: the build.
        name: of the corpus.
        adapter: of the corpus; it knows where the corpus is published.
        revisions: commits of the repositories of the Hugging Face hub that are read, by repository and branch as URLs
            name them; what is not there yet is looked up and put there.

    Returns:
        Name within the corpus, with `/`, and path or URL of each.

    Raises:
        DataError: nothing is there, nothing of it can be read, or a file is there under two names.
        ConfigError: the path names an environment variable that is not set.
    """
    corpus, where = config.corpora[name], f"corpora.{name}"
    if corpus.path is None:
        return _hub_files(where, adapter, revisions)
    path = expand(corpus.path, f"{where}.path")
    if "://" in path and not path.startswith("file://"):
        return _remote_files(where, path, adapter, _way_out(where), revisions)
    return _local_files(where, corpus, adapter, os.path.expanduser(path.removeprefix("file://")))


def _way_out(where: str) -> tuple[str, str]:
    return "fsspec reads it", f"reach it from this machine, or set {where}.path to a copy"


def unread_files(config: Inputs, revisions: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Files in the folders of corpora that no corpus reads; told on stderr.

    Their names are of no form it knows, or not of the files that the adapter's corpus is published in, while others
    there are: other splits and subsets of its repository.

    Args:
        config: the build.
        revisions: commits of what is read from the Hugging Face hub, as `corpus_files` left them.

    Returns:
        For each corpus that has such files how many, and the names of the first 20; files that are hidden do not count.

    Raises:
        DataError: a server does not answer.
    """
    found, revisions = {}, {} if revisions is None else revisions
    for name in config.corpora:
        adapter = adapter_of(config, name)
        others, foreign = _unread(config.corpora[name], f"corpora.{name}", adapter, revisions)
        _tell_unread(name, foreign, f"a corpus is files of {_KINDS}")
        _tell_unread(name, others, f"adapter {adapter.name} reads {adapter.files} (a glob as path reads what it names)")
        if names := sorted(foreign + others):
            found[name] = {"files": len(names), "first": names[:_NAMED]}
    return found


def _tell_unread(corpus: str, names: list[str], why: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        said = f"octo: corpora.{corpus}: {len(names)} files not read, for {why}: {shown}"
        print(said, file=sys.stderr, flush=True)


def _unread(corpus: Corpus, where: str, adapter: Adapter, revisions: dict[str, str]) -> tuple[list[str], list[str]]:
    path = expand(corpus.path, f"{where}.path") if corpus.path else ""
    if "://" in path and not path.startswith("file://"):
        _, root, paths = _listed(where, path, _way_out(where), revisions, _all_afar)
    else:
        root = os.path.expanduser(path.removeprefix("file://"))
        paths = [one for one in _all_in(root) if os.path.isfile(one)] if os.path.isdir(root) else []
    left = sorted({*paths} - {*_read_of(root, paths, adapter)})
    others = [_below(root, one) for one in left if _is_corpus(one)]
    return others, [_below(root, one) for one in left if not _is_corpus(one)]


def _read_of(root: str, paths: list[str], adapter: Adapter) -> list[str]:
    """What is read of the files below a folder: of a copy of the adapter's repository what its corpus is, else all."""
    known = [one for one in paths if _is_corpus(one)]
    last = adapter.files.rpartition("/")[2]
    # a folder of the copy has its file names alone, and those tell nothing where they are but a form
    for pattern in (adapter.files, *([f"**/{last}"] if last[:1] not in ("", "*") else [])):
        matches = re.compile(re.escape(pattern).replace(r"\*\*/", "(?:.+/)?").replace(r"\*", "[^/]*")).fullmatch
        own = [one for one in known if matches(_below(root, one))]
        if own:
            return own
    return known


def _below(root: str, path: str) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _all_in(folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True)


def _all_afar(system: Any, path: str) -> list[str]:
    return [] if glob.has_magic(path) or system.isfile(path) else system.find(path)


def _local_files(where: str, corpus: Corpus, adapter: Adapter, path: str) -> list[tuple[str, str]]:
    assert corpus.path is not None
    if os.path.isfile(path):
        _refuse_unreadable(where, [path])
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        root, paths = path, _read_of(path, [one for one in _all_in(path) if os.path.isfile(one)], adapter)
    elif glob.has_magic(path):
        root, paths = os.path.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0]), glob.glob(path, recursive=True)
    else:
        raise DataError(f"{where}: {path} does not exist", corpus.hint, _fix(corpus.path, path))
    paths = sorted(one for one in paths if os.path.isfile(one))
    if not paths:
        what = f"{where}: {path} holds no file of {_KINDS}"
        if os.path.isdir(path) and any(_DESCRIBES.search(one) for one in _all_in(path)):
            what += " (a .json is read where a glob or its own path names it)"
        raise DataError(what, corpus.hint, _fix(corpus.path, path))
    _refuse_unreadable(where, paths)
    _refuse_twice(where, paths)
    return [(_below(root or ".", one), one) for one in paths]


def _remote_files(
    where: str, url: str, adapter: Adapter, way_out: tuple[str, str], revisions: dict[str, str]
) -> list[tuple[str, str]]:
    def find(system: Any, path: str) -> list[str]:
        system.invalidate_cache()  # of a listing that is older than this build
        return _expanded(system, path, adapter)

    system, _, found = _listed(where, url, way_out, revisions, find)
    if not found:
        raise DataError(f"{where}: {url} holds no file of {_KINDS}", *way_out)
    _refuse_unreadable(where, found)
    root = os.path.commonpath([os.path.dirname(one) for one in found])
    return [(os.path.relpath(one, root), system.unstrip_protocol(one)) for one in found]


def _listed(
    where: str, url: str, way_out: tuple[str, str], revisions: dict[str, str], find: Callable[[Any, str], list[str]]
) -> tuple[Any, str, list[str]]:
    """The file system of a URL, the path there, on the hub in a commit, and what `find` finds with the two."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if url.startswith("hf://"):
            path = _pinned(system, path, revisions)
        return system, path, find(system, path)
    except Exception as error:  # each file system raises errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{where}: {url} cannot be listed ({reason})", *way_out) from None


def _pinned(hub: Any, path: str, revisions: dict[str, str]) -> str:
    """The path in the commit that a branch of the hub points to, or pointed to when this was asked first."""
    from huggingface_hub import HfApi

    found = hub.resolve_path(path)
    if not hasattr(found, "revision"):  # a bucket
        return path
    if found.root not in revisions:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        revisions[found.root] = api.repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision).sha
    return f"{found.root.partition('@')[0]}@{revisions[found.root]}/{found.path}"


def _expanded(system: Any, path: str, adapter: Adapter) -> list[str]:
    if glob.has_magic(path):
        return sorted(one for one in system.glob(path) if system.isfile(one))
    if system.isfile(path):
        return [path]
    return sorted(_read_of(path, system.find(path), adapter))


def _hub_files(where: str, adapter: Adapter, revisions: dict[str, str]) -> list[tuple[str, str]]:
    if adapter.hub is None:
        raise DataError(f"{where} names no path", f"adapter {adapter.name} is a shape and no corpus", "set its path")
    rule = f"without a path, {adapter.name} is read from the Hugging Face hub"
    if adapter.gated:
        rule += f", which gives it {adapter.gated}: HF_TOKEN tells who you are"
    fix = f"set {where}.path to a copy: hf download --repo-type dataset {adapter.hub} --include {adapter.files!r}"
    return _remote_files(where, f"hf://datasets/{adapter.hub}/{adapter.files}", adapter, (rule, fix), revisions)


def _is_corpus(path: str) -> bool:
    """Whether a file found in a folder is of a corpus; a plain `.json` there describes it, by custom."""
    return _READABLE.search(path) is not None and _DESCRIBES.search(path) is None


def _refuse_unreadable(where: str, paths: list[str]) -> None:
    for path in paths:
        if not _READABLE.search(path):
            raise DataError(f"{where}: {path} is no file of {_KINDS}", "its name tells what it is", "name other files")


def _refuse_twice(where: str, paths: list[str]) -> None:
    known: dict[str, str] = {}
    for path in paths:
        other = known.setdefault(os.path.realpath(path), path)
        if other != path:
            raise DataError(
                f"{where}: {path} and {other} are one file", "its documents would count twice", "remove one of them"
            )


def _fix(written: str, path: str) -> str:
    names = variables_of(written)
    return f"put it at {path}" + (f", or set {names[0]} to where it is ({written})" if names else "")

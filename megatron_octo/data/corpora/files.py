"""The files of a corpus: one, a folder, a glob, or a URL that fsspec knows."""

from __future__ import annotations

import glob
import os
import re
import sys
from pathlib import Path
from typing import Any

from megatron_octo.config.data import Corpus, InputFile, Inputs, expand, expand_path, variables_of
from megatron_octo.data.corpora.registry import Adapter
from megatron_octo.errors import DataError

_READABLE = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst|\.zstd)?$|\.parquet$")
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
        rule, fix = "fsspec reads it", f"reach it from this machine, or set {where}.path to a copy"
        return _remote_files(where, path, rule, fix, revisions)
    return _local_files(where, corpus, os.path.expanduser(path.removeprefix("file://")))


def unread_files(config: Inputs) -> dict[str, dict[str, Any]]:
    """Files in the folders of corpora that no corpus reads, for their names are of no form it knows; told on stderr.

    Args:
        config: the build.

    Returns:
        For each corpus that has such files how many, and the names of the first 20; files that are hidden do not count.
    """
    found = {}
    for name, corpus in config.corpora.items():
        names = _unread(corpus, f"corpora.{name}")
        if names:
            found[name] = {"files": len(names), "first": names[:_NAMED]}
            shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            said = f"not read, for a corpus is files of {_KINDS}"
            print(f"octo: corpora.{name}: {len(names)} files {said}: {shown}", file=sys.stderr, flush=True)
    return found


def _unread(corpus: Corpus, where: str) -> list[str]:
    path = expand(corpus.path, f"{where}.path") if corpus.path else ""
    if "://" in path and not path.startswith("file://"):
        import fsspec

        system, root = fsspec.core.url_to_fs(path)
        paths = [] if glob.has_magic(root) or system.isfile(root) else system.find(root)
    else:
        root = os.path.expanduser(path.removeprefix("file://"))
        paths = [one for one in _all_in(root) if os.path.isfile(one)] if os.path.isdir(root) else []
    return sorted(Path(os.path.relpath(one, root)).as_posix() for one in paths if not _is_corpus(one))


def _all_in(folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True)


def _local_files(where: str, corpus: Corpus, path: str) -> list[tuple[str, str]]:
    assert corpus.path is not None
    if os.path.isfile(path):
        _refuse_unreadable(where, [path])
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        root, paths = path, [one for one in _all_in(path) if _is_corpus(one)]
    elif glob.has_magic(path):
        root, paths = os.path.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0]), glob.glob(path, recursive=True)
    else:
        raise DataError(f"{where}: {path} does not exist", corpus.hint, _fix(corpus.path, path))
    paths = sorted(one for one in paths if os.path.isfile(one))
    if not paths:
        raise DataError(f"{where}: {path} holds no file of {_KINDS}", corpus.hint, _fix(corpus.path, path))
    _refuse_unreadable(where, paths)
    _refuse_twice(where, paths)
    return [(Path(os.path.relpath(one, root or ".")).as_posix(), one) for one in paths]


def _remote_files(where: str, url: str, rule: str, fix: str, revisions: dict[str, str]) -> list[tuple[str, str]]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if url.startswith("hf://"):
            path = _pinned(system, path, revisions)
        found = _expanded(system, path)
    except Exception as error:  # each file system raises errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{where}: {url} cannot be listed ({reason})", rule, fix) from None
    if not found:
        raise DataError(f"{where}: {url} holds no file of {_KINDS}", rule, fix)
    _refuse_unreadable(where, found)
    root = os.path.commonpath([os.path.dirname(one) for one in found])
    return [(os.path.relpath(one, root), system.unstrip_protocol(one)) for one in found]


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


def _expanded(system: Any, path: str) -> list[str]:
    if glob.has_magic(path):
        return sorted(one for one in system.glob(path) if system.isfile(one))
    if system.isfile(path):
        return [path]
    return sorted(one for one in system.find(path) if _is_corpus(one))


def _hub_files(where: str, adapter: Adapter, revisions: dict[str, str]) -> list[tuple[str, str]]:
    if adapter.hub is None:
        raise DataError(f"{where} names no path", f"adapter {adapter.name} is a shape and no corpus", "set its path")
    rule = f"without a path, {adapter.name} is read from the Hugging Face hub"
    if adapter.gated:
        rule += f", which gives it {adapter.gated}: HF_TOKEN tells who you are"
    fix = f"set {where}.path to a copy: hf download --repo-type dataset {adapter.hub} --include {adapter.files!r}"
    return _remote_files(where, f"hf://datasets/{adapter.hub}/{adapter.files}", rule, fix, revisions)


def _is_corpus(path: str) -> bool:
    """Whether a file found in a folder is of the corpus; a plain `.json` there describes it, by custom."""
    return _READABLE.search(path) is not None and not path.endswith(".json")


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

"""YAML files and dotted overrides -> typed configuration; every complaint names file, field and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_octo.config.explain import explain
from megatron_octo.config.recipes import packaged
from megatron_octo.errors import ConfigError
from megatron_octo.files import write_text

Config = TypeVar("Config", bound=BaseModel)


def load_config(kind: type[Config], path: Path, overrides: list[str] | None = None) -> Config:
    """Read one configuration file.

    Args:
        kind: the configuration class the file must fit.
        path: a YAML file. Its key `base:`, if any, names a YAML file, or a list of them, whose values are taken first:
            relative to it, or a packaged one as `recipes/...`. What comes later in the list, and last the file
            itself, wins.
        overrides: `dotted.key=value` strings that win over the file; values are YAML.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: missing file, bad YAML, unknown key (nearest name or all names shown), wrong type or rule.
    """
    values = apply_overrides(read_yaml(path), overrides or [])
    return parse_config(kind, values, str(path))


def parse_config(kind: type[Config], values: dict[str, Any], where: str) -> Config:
    """Check plain values against a configuration class; `where` names their origin in messages."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain(kind, error, values, where) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, following `base:` to the files it builds on.

    Raises:
        ConfigError: the file is missing, not YAML, not a mapping, or builds on itself.
    """
    return _read_chain(path, ())


def _read_chain(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    values = _read_mapping(path)
    if "base" not in values:
        return values
    base = values.pop("base")
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        rule = "it names one YAML file, or a list of them, relative to this one"
        raise ConfigError(f"{path}: base = {base!r}", rule, "give the path")
    chain, under = (*above, path.resolve()), {}
    for name in names:
        beside = path.parent / name
        file = beside if beside.exists() else packaged(Path(name)) or beside
        if file.resolve() in chain:
            raise ConfigError(f"{path}: base = {name!r} builds on itself", fix="end the circle: remove one 'base'")
        under = merge(under, _read_chain(file, chain))
    return merge(under, values)


class _OnceEach(yaml.SafeLoader):
    """YAML as it is, but for a key that stands twice in one mapping: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping.

        Raises:
            ConstructorError: a key stands twice.
        """
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _OnceEach)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", fix="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", fix="name a readable YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date that is none
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})", fix="mend that line") from None
    if not isinstance(values, dict):
        holds = "is empty" if values is None else f"holds {type(values).__name__}"
        raise ConfigError(f"{path}: {holds}", "a configuration file is a mapping of keys", "write 'key: value' lines")
    return values


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one nested mapping over another; lists and scalars are replaced whole."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Lay `dotted.key=value` strings over a nested mapping.

    Raises:
        ConfigError: an override without `=`, or one whose value is not YAML.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} has no '='", fix="write key.subkey=value")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def dump_config(config: BaseModel, path: Path) -> None:
    """Write, in one step, a resolved configuration as YAML that `load_config` reads back to an equal object."""
    write_yaml(path, config.model_dump(mode="json"))


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as YAML in one step, keys in their order."""
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List the dotted fields in which two nested values differ, as 'field: old -> new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys(), key=str):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]

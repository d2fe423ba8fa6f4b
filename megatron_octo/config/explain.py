"""What pydantic found wrong with a file, in words of the file: the key as it stands there, the rule, and the cure."""

from __future__ import annotations

import difflib
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_octo.errors import ConfigError
from megatron_octo.units import parse_tokens

Location = tuple[Any, ...]
_BLOCKS = ("model_type", "dict_type")


def explain(kind: type[BaseModel], error: ValidationError, values: Any, where: str) -> ConfigError:
    """Every mistake of a file in one error, unknown keys first: one of them is often why another is missing.

    Args:
        kind: the configuration class that the values do not fit.
        error: what pydantic says of it.
        values: as the file has them.
        where: their origin, for the message.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    places: dict[Location, list[Any]] = {}
    for problem in problems:  # of one place there is one for each alternative of its type
        places.setdefault(_place(problem["loc"], values), []).append(problem)
    guessed = {_guess(kind, problem["loc"]) for problem in problems if problem["type"] == "extra_forbidden"}
    found = [_one(kind, at, each) for at, each in places.items() if each[0]["type"] != "missing" or at not in guessed]
    if len(found) == 1:
        return ConfigError(f"{where}: {found[0].what}", found[0].rule, found[0].fix)
    return ConfigError(f"{where}: {len(found)} mistakes:" + "".join(f"\n  - {one}" for one in found))


def _place(location: Location, values: Any) -> Location:
    """The part of a location that the file has, and one key more; the rest names alternatives of a type."""
    for depth, part in enumerate(location):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return location[:depth] if not isinstance(values, dict) else location[: depth + 1]
    return location


def _one(kind: type[BaseModel], place: Location, alternatives: list[Any]) -> ConfigError:
    """One mistake; a choice of words that would do as well is told behind what else the value could have been."""
    words = [problem["ctx"]["expected"] for problem in alternatives if problem["type"] == "literal_error"]
    others = [problem for problem in alternatives if problem["type"] != "literal_error"]
    problem = (others or alternatives)[0]
    field = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        return ConfigError(f"unknown key '{field}'", fix=_instead(kind, place))
    if problem["type"] == "missing":
        return ConfigError(f"key '{field}' is missing", fix="add it")
    if problem["loc"][-1:] == ("[key]",):
        return ConfigError(f"unknown key '{field}'", fix=f"the keys there are {problem['ctx']['expected']}")
    if problem["type"] == "invalid_key":
        return ConfigError(f"unknown key '{field}'", "keys are words", _instead(kind, place))
    message = problem["msg"].removeprefix("Value error, ")
    if not field:
        return ConfigError(message, fix="change one of them")
    value = "" if isinstance(problem["input"], (dict, list)) else f" = {problem['input']!r}"
    if problem["type"] in _BLOCKS:
        rule, fix = _block(kind, place, problem)
        return ConfigError(f"{field}{value}", rule, fix)
    fix = f"change '{field}'" if problem["type"] == "value_error" else f"give '{field}' such a value"
    if problem["type"].startswith("int_"):
        message = "it must be an integer"
        with suppress(ValueError):
            fix = f"only counts of tokens take a suffix: write {parse_tokens(problem['input'])}"
    return ConfigError(f"{field}{value}", message, f"{fix}, or write {words[0]}" if words and others else fix)


def _block(kind: type[BaseModel], place: Location, problem: Any) -> tuple[str, str]:
    """Rule and cure where a single value stands in the place of a block of keys."""
    name, given, model = place[-1], problem["input"], _model_at(kind, place)
    keys = list(model.model_fields) if model else []
    if problem["type"] == "dict_type":
        each = f", each with keys of {', '.join(keys)}" if keys else ""
        return f"a block of names belongs here{each}", f"write '{name}:' and the names below it"
    rule = f"a block of keys belongs here: {', '.join(keys)}"
    if model is None:
        return problem["msg"], f"change '{name}'"
    required = [key for key, field in model.model_fields.items() if field.is_required()]
    if given is False:
        return rule, "leave it out"
    if isinstance(given, str) and "path" in keys and set(required) <= {"path"}:
        return rule, f"write '{name}: {{path: {given}}}'"
    if _needs_nothing(model):
        return rule, f"write '{name}: {{}}', which takes the defaults of all"
    if not required:
        return rule, "write " + " or ".join(f"'{name}: {{{key}: ...}}'" for key in keys)
    return rule, f"write '{name}: {{{', '.join(f'{key}: ...' for key in required)}}}'"


def _needs_nothing(model: type[BaseModel]) -> bool:
    with suppress(ValidationError):
        model.model_validate({})
        return True
    return False


def _instead(kind: type[BaseModel], location: Location) -> str:
    """The cure for an unknown key: the name that was meant, or those that there are."""
    guess = _guess(kind, location)
    if guess:
        return f"did you mean '{'.'.join(str(part) for part in guess[len(location) - 1 :])}'?"
    model = _model_at(kind, location[:-1])
    return "remove it" + (f"; the keys there are {', '.join(model.model_fields)}" if model else "")


def _guess(kind: type[BaseModel], location: Location) -> Location | None:
    """Where a key was meant to stand that is misspelt, or that belongs into a block beside it."""
    *above, key = location
    model = _model_at(kind, tuple(above))
    fields = model.model_fields if model else {}
    near = difflib.get_close_matches(str(key), list(fields), n=1)
    if near:
        return (*above, near[0])
    blocks = {name: _models_in(field.annotation) for name, field in fields.items()}
    inside = [name for name, models in blocks.items() if any(key in model.model_fields for model in models)]
    one = len(inside) == 1 and "dict[" not in str(fields[inside[0]].annotation)
    return (*above, inside[0], key) if one else None


def _model_at(kind: Any, location: Location) -> type[BaseModel] | None:
    """The configuration class of a block; where a location stands in a dict or a list, that of its values."""
    for part in location:
        field = getattr(kind, "model_fields", {}).get(part)
        nested = [] if field is None else _models_in(field.annotation)
        if nested:
            kind = nested[0]
        elif field is not None:
            return None
    return kind if hasattr(kind, "model_fields") else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]

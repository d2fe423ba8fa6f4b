"""What every configuration class shares: frozen, typed, and no unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A field that holds a seed; numpy and Megatron take these."""


class Strict(BaseModel):
    """Base of all configuration: immutable; unknown keys are refused, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_yes(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which Python takes for 1."""
        if not _takes_bool(cls.model_fields[info.field_name].annotation):
            for one in _scalars(value):
                if isinstance(one, bool):
                    raise ValueError(f"YAML reads it as {str(one).lower()}, which is neither a number nor a text")
        return value


def _takes_bool(annotation: Any) -> bool:
    inner = getattr(annotation, "__args__", ())
    model = isinstance(annotation, type) and issubclass(annotation, BaseModel)  # which looks at its own fields
    return model or annotation in (bool, Any) or any(_takes_bool(one) or isinstance(one, bool) for one in inner)


def _scalars(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if inner is None:
        yield value
        return
    for one in inner:
        yield from _scalars(one)

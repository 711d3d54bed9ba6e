"""The base of all settings: pydantic models that refuse what they do not know."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Affects = Literal["tokens", "weights", "scores", "nothing"]
"""The first result that a setting changes. What comes later in this list changes with it."""

NAME = re.compile(r"[A-Za-z0-9_]+")
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+$")]
"""A name in a study. DVC's keys must not contain dots, and "-" separates the parts of a unit."""


class Settings(BaseModel):
    """Settings as a person writes them: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def changed(self, **values: Any) -> Self:
        """A copy with other values, which are not checked."""
        return self.model_copy(update=values)


def setting(default: Any, meaning: str, affects: Affects = "weights", **constraints: Any) -> Any:
    """A field of settings.

    Args:
        default: its value where none is given; `...` if one must be given.
        meaning: what it does, with its unit.
        affects: the first result that it changes; keys are made from this (`study.keys`).
        constraints: of pydantic's `Field`, e.g. `ge=0`.
    """
    extra: dict[str, Any] = {"affects": affects}
    return Field(default, description=meaning, json_schema_extra=extra, **constraints)

"""What every configuration class has in common: frozen, complete, and closed to unknown keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

_LONGEST_NAME = 255


class Config(BaseModel):
    """Base of all configuration classes: unknown keys and non-finite numbers are errors, a value read never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _paths_that_can_be(cls, value: Any) -> Any:
        for name in value.parts if isinstance(value, Path) else ():
            if (size := len(os.fsencode(name))) > _LONGEST_NAME:
                raise ValueError(
                    f"the name {name[:20]}... of {size} bytes is too long: a file system takes {_LONGEST_NAME}"
                )
        return value


def at_most(most: int) -> AfterValidator:
    """A bound of a size, far above what is built anywhere, so that a slip of the keyboard is told before a model of
    that size fills the machine."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"{value:,} is more than any machine could work with: at most {most:,} are taken")
        return value

    return AfterValidator(check)

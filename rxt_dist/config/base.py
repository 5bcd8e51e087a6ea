"""What every configuration class has in common: frozen, complete, and closed to unknown keys."""

from __future__ import annotations

from pydantic import AfterValidator, BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configuration classes: unknown keys and non-finite numbers are errors, a value read never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def at_most(most: int) -> AfterValidator:
    """A bound of a size, far above what is built anywhere, so that a slip of the keyboard is told before a model of
    that size fills the machine."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"{value:,} is more than any machine could work with: at most {most:,} are taken")
        return value

    return AfterValidator(check)

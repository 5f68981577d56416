"""What all settings share: frozen, typed groups that reject unknown keys, and messages that name a wrong one."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from crossdiff.errors import UserError
from crossdiff.files import short_repr


class Config(BaseModel):
    """A frozen group of settings that rejects unknown keys, infinity and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""The seed of a random number generator."""


C = TypeVar("C", bound=Config)


def validate(model: type[C], values: Any, origin: str) -> C:
    """Build `model` from plain values. A `UserError` lists every wrong key with its value and what was expected."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            found = "" if item["type"] == "missing" else f" (found {short_repr(item['input'])})"
            message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
            lines.append(f"{key}: {message}{found}")
        raise UserError(f"{origin} has wrong settings:\n  " + "\n  ".join(lines)) from None


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `values`, key by key down the tree."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged

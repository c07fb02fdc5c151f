"""The base of every part of the configuration tree."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know.

    Fields carry their unit and range in a docstring under the field; bounds are pydantic's `Field(gt=...)`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def other_kind(cls, keys: Collection[str]) -> str | None:
        """Return what a file with these top-level keys is, and what to do with it, if it is plainly of another kind."""
        del keys
        return None

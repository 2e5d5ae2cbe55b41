"""What every section of the configuration shares: strictness, immutability, paths, units."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Strict

# Strict everywhere except here: YAML has no path type, so a string is right. The shell does not
# expand "~" inside a YAML file, and a folder literally named "~" is never meant.
# (os.path: for an unknown user it leaves the path as it is, where Path.expanduser raises.)
ConfigPath = Annotated[
    Path, Strict(False), AfterValidator(lambda path: Path(os.path.expanduser(path)))
]


class Section(BaseModel):
    """Base of all sections.

    Frozen, so that a run cannot drift from the configuration it recorded; strict, so that "8" or
    8.5 is never quietly read as 8; unknown keys and infinite numbers are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def is_set(self, name: str) -> bool:
        """Whether the user gave field `name` a value other than its default.

        A resolved configuration names every field, so a field at its default counts as not set.
        """
        field = type(self).model_fields[name]
        return name in self.model_fields_set and getattr(self, name) != field.get_default(
            call_default_factory=True, validated_data={}
        )


def unit(name: str) -> dict[str, Any]:
    """Metadata that records the unit of a field; "1" is a pure number, "-" is not a quantity."""
    return {"unit": name}

"""What all sections of the configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Settings of one section. An unknown key is an error; values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

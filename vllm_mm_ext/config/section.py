"""What all sections of the configuration have in common."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

# YAML 1.1 reads these words as booleans unless they are quoted.
_YAML_WORDS = {True: ("on", "yes"), False: ("off", "no")}


class Section(BaseModel):
    """Settings of one section: unknown keys are errors, numbers finite, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _words(cls, given: Any) -> Any:
        """Take a boolean for the word that stood in the YAML file, where words are the choices."""
        if not isinstance(given, dict):
            return given
        return {key: cls._word(key, value) for key, value in given.items()}

    @classmethod
    def _word(cls, key: Any, value: Any) -> Any:
        field = cls.model_fields.get(key) if isinstance(value, bool) else None
        if field is None or get_origin(field.annotation) is not Literal:
            return value
        choices = get_args(field.annotation)
        return next((word for word in _YAML_WORDS[value] if word in choices), value)

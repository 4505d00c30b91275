"""What an operator may ask by the admin API. Pure."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_DIGEST = re.compile(r"[0-9a-f]{64}")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SessionRequest(_Body):
    """A conversation of the KV cache, as its requests name it, or a live session.

    Attributes:
        session_id: Id of the conversation (`session_id` of its requests), or of a live session.
        cache_salt: The `cache_salt` of its requests, if they have one.
    """

    session_id: str = Field(min_length=1, max_length=4096)
    cache_salt: str | None = Field(None, min_length=1, max_length=4096)


class MediaRequest(_Body):
    """A file: by a URL that requests named, or by the BLAKE3 digest of its bytes.

    Attributes:
        url: A http(s) or file URL.
        digest: 64 hexadecimal digits.
    """

    url: str | None = Field(None, min_length=1, max_length=1 << 16)
    digest: str | None = None

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        if (self.url is None) == (self.digest is None):
            raise ValueError("give one of url and digest")
        if self.url is not None and self.url[:5].lower() == "data:":
            raise ValueError("a data URL is named by the digest of the file that it holds")
        if self.digest is not None and not _DIGEST.fullmatch(self.digest):
            raise ValueError(
                f"digest must be 64 lower-case hex digits (BLAKE3), got {self.digest[:80]!r}"
            )
        return self


SessionAction = Literal["pin", "unpin", "release", "end"]
MediaAction = Literal["pin", "unpin", "release", "drop"]


def problem_of(error: ValidationError) -> str:
    """What is wrong with a body, in one line per problem.

    Args:
        error: Of a model of this module.
    """
    lines = []
    for found in error.errors():
        where = ".".join(str(part) for part in found["loc"])
        what: Any = found["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}" if where else str(what))
    return "; ".join(lines)

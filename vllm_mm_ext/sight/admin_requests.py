"""What an operator may ask by the admin API. Pure."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_mm_ext.policies.kv.control import key_of

_DIGEST = re.compile(r"[0-9a-f]{64}")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SessionRequest(_Body):
    """A conversation of the KV cache, as its requests name it or as it is listed; a live session.

    Attributes:
        session_id: Id of the conversation (`session_id` of its requests), or of a live session.
        cache_salt: The `cache_salt` of its requests, if they have one.
        key: The id by which the engines list the conversation. It is another than that of its
            requests where they have a `cache_salt` or a long id; nobody knows those of the prompts
            of live sessions.
    """

    session_id: str | None = Field(None, min_length=1, max_length=4096)
    cache_salt: str | None = Field(None, min_length=1, max_length=4096)
    key: str | None = Field(None, min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        if (self.session_id is None) == (self.key is None):
            raise ValueError("give one of session_id and key")
        if self.key is not None and self.cache_salt is not None:
            raise ValueError("a key stands for the cache_salt as well")
        return self

    @property
    def kv_key(self) -> str:
        """The key under which the engines know the conversation."""
        return self.key or key_of(self.session_id or "", self.cache_salt)


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

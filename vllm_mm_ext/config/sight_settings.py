"""Settings of what an operator sees of a running server: the section ``mm_ext.sight``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from vllm_mm_ext.config.section import Section


class SightSettings(Section):
    """What an operator sees of a running server."""

    metrics: bool = Field(
        True,
        description="Whether `/metrics` has the plugin's metrics beside vLLM's own. "
        "`--disable-log-stats` turns both off.",
    )
    page: bool = Field(
        False,
        description="Whether the server has the page `/mm_ext/` and the JSON behind it: caches, "
        "sessions and recent requests of all clients, with their URLs. Whoever has vLLM's API key "
        "may see it; without a key, whoever reaches the server.",
    )
    admin: bool = Field(
        False,
        description="Whether whoever may see the page may also pin and release sessions and media, "
        "and take media down. Needs `page`.",
    )
    thumbnails: bool = Field(
        False, description="Whether the page shows small pictures of the frames of requests."
    )
    recent_requests: int = Field(
        200,
        ge=1,
        le=10_000,
        description="Requests with media that each API server remembers for the page; at most "
        "64 MiB of them.",
    )

    @model_validator(mode="after")
    def _admin_needs_page(self) -> Self:
        for name in ("admin", "thumbnails"):
            if getattr(self, name) and not self.page:
                raise ValueError(f"{name} is true but page is false; set page to true as well")
        return self

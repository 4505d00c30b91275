"""Settings of what answers tell, the section ``mm_ext.reports`` of the configuration."""

from __future__ import annotations

from pydantic import Field

from vllm_mm_ext.config.section import Section


class ReportsConfig(Section):
    """What answers tell clients about the server."""

    cache_hits: bool = Field(
        False,
        description="Tell clients what caches held of their media: `decoded_cache` and `cache` of "
        "the `mm_ext` block, `cached` of `X-MM-Ext`. Caches serve all clients, so a hit can tell "
        "one of them that another has sent the same media; times can tell it too, if less surely. "
        "vLLM's `--enable-prompt-tokens-details` tells it as well.",
    )

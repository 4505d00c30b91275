"""Settings of the KV blocks, the section ``mm_ext.kv`` of the configuration."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from vllm_mm_ext.config.section import Section


class KVSettings(Section):
    """What stays in the KV cache when nobody uses it at the moment.

    What is least likely to save work goes first. The settings bound what media may keep of the
    cache, whatever they save; by default nothing does. Kept blocks stay available: a request that
    needs them takes them.
    """

    enabled: bool = Field(True, description="False: stock vLLM's block pool.")
    max_visual_cache_gb: float | None = Field(
        None,
        gt=0,
        le=1 << 16,
        description="GiB of one engine's KV cache (of each of its GPUs) that media without a "
        "running request may keep; null: `max_visual_cache_share`.",
    )
    max_visual_cache_share: float = Field(
        1.0, ge=0, le=1, description="The same as a share of the KV cache."
    )
    pressure_limit: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the KV cache, in use or kept by media, above which media are given "
        "up even within the quota.",
    )
    min_items: int = Field(
        4,
        ge=0,
        le=1 << 20,
        description="Mm items (a segment of a video is one), and texts after them, that quota and "
        "pressure leave kept.",
    )

    @model_validator(mode="after")
    def _one_quota(self) -> Self:
        both = {"max_visual_cache_gb", "max_visual_cache_share"} <= self.model_fields_set
        if both and self.max_visual_cache_gb is not None:
            raise ValueError(
                "give one of max_visual_cache_gb and max_visual_cache_share, got "
                f"{self.max_visual_cache_gb:g} and {self.max_visual_cache_share:g}"
            )
        return self

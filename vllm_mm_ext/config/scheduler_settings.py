"""Settings of the scheduler, the section ``mm_ext.scheduler`` of the configuration."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from vllm_mm_ext.config.section import Section


class SchedulerSettings(Section):
    """What an engine step may hold, and how long a request may be passed by others.

    In effect with `--scheduler-cls vllm_mm_ext.scheduler.MMExtScheduler`.
    """

    target_itl_ms: float = Field(
        50.0,
        gt=0,
        le=60_000,
        description="Time between tokens to aim at. While something decodes, prefill of a step may "
        "take this long, and encoder work what decoding and prefill leave of it, but a fifth of a "
        "step at least, and more as its backlog grows. A video that is alone is encoded and "
        "prefilled in turns. At most one step in eight puts text first: it holds no media, or ends "
        "a video as well and takes up to half as long again.",
    )
    encoder_tokens_decoding: int = Field(
        0,
        ge=0,
        le=1 << 20,
        description="Encoder tokens per step, on average, while something decodes, whatever they "
        "take; 0: as many as `target_itl_ms` allows.",
    )
    encoder_tokens_idle: int = Field(
        0,
        ge=0,
        le=1 << 20,
        description="Encoder tokens per step while nothing decodes, not less than "
        "`encoder_tokens_decoding`; 0: vLLM's own bound.",
    )
    encoder_step_idle_ms: float = Field(
        2000.0,
        gt=0,
        le=600_000,
        description="Estimated time of a step's encoder work while nothing decodes. One item is "
        "encoded however long it takes.",
    )
    max_encoder_batch: int = Field(
        64, ge=1, le=4096, description="Items (segments, images, sounds) encoded in a step."
    )
    lookahead_items: int = Field(
        64,
        ge=0,
        le=256,
        description="Items of a request that a step may encode beyond those its prefill gets to.",
    )
    prefill_share: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="Share of `--max-num-batched-tokens` that prefill may take in a step while "
        "something decodes.",
    )
    text_slots: int = Field(
        1,
        ge=0,
        le=4096,
        description="Of `--max-num-seqs`, slots that requests with encoder work leave free for "
        "others; at most a quarter of all.",
    )
    aging_s: float = Field(
        30.0,
        gt=0,
        le=86_400,
        description="Seconds that a request should wait for its first token at most. After half "
        "of them no later request passes it, whatever its size or priority.",
    )

    @model_validator(mode="after")
    def _idle_is_the_larger_cap(self) -> Self:
        if 0 < self.encoder_tokens_idle < self.encoder_tokens_decoding:
            raise ValueError(
                f"encoder_tokens_idle must be 0 or at least encoder_tokens_decoding "
                f"({self.encoder_tokens_decoding}), got {self.encoder_tokens_idle}"
            )
        return self

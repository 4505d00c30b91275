"""Settings of the scheduler, the section ``mm_ext.scheduler`` of the configuration."""

from __future__ import annotations

from pydantic import Field

from vllm_mm_ext.config.section import Section


class SchedulerSettings(Section):
    """What an engine step may hold, and how long a request may be passed by others.

    In effect with `--scheduler-cls vllm_mm_ext.scheduler.MMExtScheduler`.
    """

    target_itl_ms: float = Field(
        50.0,
        gt=0,
        le=60_000,
        description="Time between tokens to aim at. While something decodes, a step computes and "
        "encodes as much of prompts as fits, but for a fifth of its time at least. An item that "
        "fits no step is encoded all the same, and the next steps encode nothing until they have "
        "made up for it.",
    )
    encoder_step_idle_ms: float = Field(
        2000.0,
        gt=0,
        le=600_000,
        description="Estimated time of a step while nothing decodes. One item is encoded however "
        "long it takes.",
    )
    max_encoder_batch: int = Field(
        64, ge=1, le=4096, description="Items (segments, images, sounds) encoded in a step."
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

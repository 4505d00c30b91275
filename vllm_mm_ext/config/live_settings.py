"""Settings of live sessions: the section ``mm_ext.live``."""

from __future__ import annotations

from pydantic import Field

from vllm_mm_ext.config.section import Section


class LiveSettings(Section):
    """Live sessions over the OpenAI Realtime protocol (`/v1/realtime`)."""

    enabled: bool = Field(True, description="Whether the server takes live sessions.")
    max_sessions: int = Field(
        64, ge=1, le=65536, description="Sessions at once in this API server; others are refused."
    )
    idle_timeout_s: float = Field(
        300.0, gt=0, le=86400, description="Seconds without an event after which a session ends."
    )
    max_session_s: float = Field(
        7200.0, gt=0, le=30 * 86400, description="Seconds after which a session ends."
    )
    session_mb: int = Field(
        256,
        ge=1,
        le=65536,
        description="MiB of sound, frames and messages that a session may hold; what is in the "
        "model's context counts, so this bounds the context too.",
    )
    max_tokens: int | None = Field(
        None,
        ge=64,
        le=1 << 24,
        description="Prompt tokens of a session at most, before its oldest turns are dropped; by "
        "default what the context leaves beside an answer.",
    )
    answer_tokens: int = Field(
        1024, ge=1, le=1 << 20, description="Tokens kept free for an answer, and its default limit."
    )
    fps: float = Field(
        1.0, gt=0, le=30, description="Frames per second that the model is shown at most."
    )
    keep_frames: int = Field(
        4, ge=0, le=512, description="Latest frames that stay in the context whatever is dropped."
    )

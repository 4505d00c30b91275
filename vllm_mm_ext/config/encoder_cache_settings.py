"""Settings of the encoder cache, the section ``mm_ext.encoder_cache`` of the configuration."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from vllm_mm_ext.config.section import Section

_URL = re.compile(r"https?://[^\s/?#@]+/?")


class EncoderCacheSettings(Section):
    """Encoder outputs kept between requests, per engine.

    The device tier takes effect with `--ec-manager-config`, the host tier with both it and
    `--ec-transfer-config` (docs/architecture.md has the values). What is evicted is what is
    expected to save the least encoder work per byte.
    """

    device_mb: float = Field(
        0.0,
        ge=0,
        le=1 << 20,
        description="Encoder outputs on the device, MiB; 0: as many tokens as vLLM's own cache, "
        "which its memory profiling covers. More must be left free by `--gpu-memory-utilization`. "
        "One output larger than this is kept while it is needed, beside the others.",
    )
    host_mb: float = Field(
        4096.0,
        gt=0,
        le=1 << 22,
        description="Encoder outputs in host memory, MiB. With vLLM's second model runner (CUDA) "
        "and no `transport` it is taken at start-up, pinned, from `/dev/shm`; else as outputs "
        "come, per worker. On CUDA torch then rounds each output up to a power of two bytes and "
        "keeps some free, which can take up to 2.5 times as much.",
    )
    encoders: tuple[str, ...] = Field(
        (),
        max_length=256,
        description="URLs of encoder instances (`http://host:port`) that are asked to encode the "
        "media of requests; needs a transport (docs/fleet-encoders.md). Empty: none is asked.",
    )
    encoder_wait_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds a request waits for an encoder instance of which nothing arrives; "
        "then its media are encoded here.",
    )

    @field_validator("encoders")
    @classmethod
    def _urls(cls, encoders: tuple[str, ...]) -> tuple[str, ...]:
        for url in encoders:
            if not _URL.fullmatch(url):
                raise ValueError(f"{url!r} is not the URL of a server, such as http://host:8000")
        return tuple(url.rstrip("/") for url in encoders)

"""The plugin's one configuration: typed, validated at start-up, read in one place.

It comes from vLLM's free-form ``--additional-config '{"mm_ext": {...}}'`` (so also from the YAML
file of ``vllm serve --config``), which vLLM hands to the API server and to the engine alike.
``docs/configuration.md`` is generated from this module (``vllm-mm config --markdown``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_mm_ext.config import schema
from vllm_mm_ext.config.encoder_cache_settings import EncoderCacheSettings
from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.config.scheduler_settings import SchedulerSettings

KEY = "mm_ext"
MIB = 1 << 20


class ConfigError(ValueError):
    """A setting under ``additional_config.mm_ext`` is wrong; the message names key and value."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingConfig(_Section):
    """Which frames of a video the model sees."""

    policy: Literal["uniform", "keyframe", "adaptive", "stock"] = Field(
        "uniform",
        description="`uniform`: at a fixed step while the limits allow, else spaced evenly. "
        "`keyframe`: the container's keyframes. "
        "`adaptive`: by content, more frames where something happens. `stock`: the frames vLLM's "
        "own loader would choose for the model, whatever the settings below.",
    )
    fps: float = Field(
        1.0, gt=0, le=60, description="Frames per second asked for before the frame limits apply."
    )
    max_frames: int = Field(
        32, ge=1, le=4096, description="Hard ceiling on the frames of one video."
    )
    min_frames: int = Field(
        4, ge=1, le=4096, description="Floor on the frames of one video, where it has that many."
    )
    min_fps: float = Field(
        0.1, ge=0, le=60, description="`adaptive`: every second keeps this rate, budget allowing."
    )
    max_fps: float = Field(
        8.0, gt=0, le=60, description="`adaptive`: no second gets more than this rate."
    )

    @model_validator(mode="after")
    def _ordered(self) -> SamplingConfig:
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames ({self.min_frames}) must not exceed max_frames ({self.max_frames})"
            )
        if self.min_fps > self.max_fps:
            raise ValueError(f"min_fps ({self.min_fps}) must not exceed max_fps ({self.max_fps})")
        return self


class DecodeConfig(_Section):
    """The pool of decode worker processes and its hard limits per job."""

    backend: Literal["auto", "pyav", "decord"] = Field(
        "auto", description="Decoder; `auto` is the measured best (docs/decoders.md)."
    )
    workers: int = Field(
        0,
        ge=0,
        le=256,
        description="Decodes at a time per API server, and probes of containers beside them, each "
        "in a worker process; 0: one per core, at most 8.",
    )
    threads: int = Field(0, ge=0, le=64, description="FFmpeg threads per job; 0: one per core.")
    timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds a job may run before its worker is killed."
    )
    worker_memory_mb: int = Field(
        4096, ge=512, le=1 << 20, description="Address-space ceiling of one worker, MiB."
    )
    max_pixels: int = Field(
        8192 * 4320, ge=1 << 10, description="Pixels of one source frame; larger is refused."
    )
    max_duration_s: float = Field(
        4 * 3600.0, gt=0, description="Seconds of video; longer is refused."
    )
    max_output_mb: int = Field(
        1024, ge=16, le=1 << 16, description="Decoded frames of one video, MiB; more is refused."
    )


class CacheConfig(_Section):
    """What the front-end holds in memory, per API server: remembered, and being worked on."""

    encoded_mb: int = Field(
        512, ge=0, le=1 << 20, description="Encoded media files kept in memory, MiB."
    )
    decoded_mb: int = Field(
        1024, ge=0, le=1 << 20, description="Sampled frames and waveforms kept in memory, MiB."
    )
    in_flight_mb: int = Field(
        2048,
        ge=16,
        le=1 << 20,
        description="The media budget: encoded files and decoded frames that all requests together "
        "are working on, from download to preprocessing, MiB; further ones wait. What the two "
        "caches keep does not count.",
    )
    max_wait_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds media waits for room in the media budget before its request is "
        "refused with a 503.",
    )


class FetchConfig(_Section):
    """Where media may be downloaded from, beside vLLM's `--allowed-media-domains`.

    Link-local addresses and the metadata services of clouds are refused whatever is set here.
    """

    private_addresses: Literal["allow", "refuse"] = Field(
        "allow",
        description="`allow`: as stock vLLM, clients may name loopback and private addresses. "
        "`refuse`: not those; for servers whose clients are not trusted.",
    )


class AudioConfig(_Section):
    """Waveforms: audio items and the sound of videos."""

    in_video: Literal["auto", "off"] = Field(
        "auto",
        description="`auto`: omni models hear the sound of a `video_url`, from the same fetch. "
        "`off`: video is silent.",
    )
    max_duration_s: float | None = Field(
        None,
        gt=0,
        description="Seconds of audio; null: vLLM's own VLLM_MAX_AUDIO_DECODE_DURATION_S. "
        "Never looser than vLLM's.",
    )
    overflow: Literal["error", "truncate"] = Field(
        "error", description="What happens to audio past the limit: a 413, or it is cut there."
    )


class MediaConfig(_Section):
    """The media front-end: from URL to sampled frames and waveforms."""

    enabled: bool = Field(
        True, description="False leaves media loading to stock vLLM; the rest stays active."
    )
    resize: Literal["target", "native"] = Field(
        "target",
        description="`target`: frames leave the decoder at the size the model's processor would "
        "resize them to. `native`: at full size, as stock vLLM delivers them.",
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    fetch: FetchConfig = Field(default_factory=FetchConfig)
    decode: DecodeConfig = Field(default_factory=DecodeConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    audio: AudioConfig = Field(default_factory=AudioConfig)


class SegmentsConfig(_Section):
    """How videos are cut into segments, each an mm item that is encoded and cached on its own."""

    tokens: int = Field(
        1024,
        ge=0,
        le=1 << 20,
        description="Tokens a segment should not exceed after reduction. One temporal patch of "
        "frames, or as many as merge, is always together. 0: a video is one segment.",
    )


class CompressionConfig(_Section):
    """Token reduction, and how much the encoder does at once."""

    reduction: Reduction = Field(
        NO_REDUCTION,
        description="How the tokens of videos are made fewer unless a request says otherwise; if "
        "not set, as the checkpoint says, if it does.",
    )
    encoder_max_patches: int = Field(
        16384,
        ge=0,
        le=1 << 24,
        description="Patches per forward of the vision encoder, which bounds its transient memory; "
        "one image, or one temporal patch of frames, is never divided. 0: no bound.",
    )

    def default_reduction(self, of_model: Reduction | None) -> Reduction:
        """The reduction of a request that names none.

        Args:
            of_model: What the served checkpoint declares, if it does; a setting outranks it.
        """
        given = "reduction" in self.model_fields_set
        return self.reduction if given or of_model is None else of_model


class ReportsConfig(_Section):
    """What answers tell clients about the server."""

    cache_hits: bool = Field(
        False,
        description="Tell clients what caches held of their media: `decoded_cache` and `cache` of "
        "the `mm_ext` block, `cached` of `X-MM-Ext`. Caches serve all clients, so a hit can tell "
        "one of them that another has sent the same media; times can tell it too, if less surely.",
    )


class MMExtConfig(_Section):
    """Everything under ``additional_config.mm_ext``."""

    media: MediaConfig = Field(default_factory=MediaConfig)
    segments: SegmentsConfig = Field(default_factory=SegmentsConfig)
    compression: CompressionConfig = Field(default_factory=CompressionConfig)
    quality: QualitySettings = Field(default_factory=QualitySettings)
    encoder_cache: EncoderCacheSettings = Field(default_factory=EncoderCacheSettings)
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings)
    kv: KVSettings = Field(default_factory=KVSettings)
    reports: ReportsConfig = Field(default_factory=ReportsConfig)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> MMExtConfig:
        """Read the plugin's part of ``VllmConfig.additional_config``.

        Args:
            additional_config: What vLLM holds: a mapping, or an object with no plugin settings.

        Raises:
            ConfigError: A key is unknown or a value is not valid; the message names the key,
                the value and what is valid.
        """
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return cls()
        raw = additional_config[KEY]
        if not isinstance(raw, Mapping):
            raise ConfigError(f"additional_config.{KEY} must be a mapping, got {raw!r}")
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    found = schema.problems(error, MMExtConfig, KEY)
    return "\n".join([f"invalid additional_config.{KEY}:", *(f"  {problem}" for problem in found)])


def to_markdown() -> str:
    """The reference page ``docs/configuration.md``."""
    lines = [
        "# Configuration",
        "",
        "Generated by `vllm-mm config --markdown`; a test keeps it current.",
        "",
        "Settings live under the key `mm_ext` of vLLM's `--additional-config`, on the command line",
        "or in the YAML file of `vllm serve --config`:",
        "",
        "```yaml",
        "additional-config:",
        "  mm_ext:",
        "    media:",
        "      sampling: {policy: adaptive, max_frames: 64}",
        "```",
        "",
        "An unknown key or a bad value stops the start-up with the key, the value and what is",
        "valid there.",
    ]
    lines += schema.reference_tables(MMExtConfig, KEY)
    return "\n".join(lines) + "\n"

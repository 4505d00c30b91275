"""Settings of the media front-end, the section ``mm_ext.media`` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vllm_mm_ext.config.section import Section


class SamplingConfig(Section):
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
    resolution: int | None = Field(
        None,
        ge=28,
        le=8192,
        description="A frame has at most this many pixels squared, unless a request asks for "
        "another `resolution`; null: as many as the model's processor allows. Models whose frames "
        "all have one size keep that one.",
    )
    min_fps: float = Field(
        0.1,
        ge=0,
        le=60,
        description="`adaptive`: no gap is wider than 1 / `min_fps` seconds, or than two mean gaps "
        "if these are wider.",
    )
    max_fps: float = Field(
        8.0,
        gt=0,
        le=60,
        description="`adaptive`: no second gets more than this rate, unless `fps` or `min_frames` "
        "asks for more.",
    )
    video_stream: int | None = Field(
        None,
        ge=0,
        le=999,
        description="Which of a file's video streams, counted from 0; null: the one that players "
        "show. Files without that stream are refused.",
    )

    @property
    def frame_pixels(self) -> int:
        """Pixels of a frame at most, 0 for no bound."""
        return (self.resolution or 0) ** 2

    @model_validator(mode="after")
    def _ordered(self) -> SamplingConfig:
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames ({self.min_frames}) must not exceed max_frames ({self.max_frames})"
            )
        if self.min_fps > self.max_fps:
            raise ValueError(f"min_fps ({self.min_fps}) must not exceed max_fps ({self.max_fps})")
        return self


class NvdecThresholds(Section):
    """What `backend: auto` decodes on a GPU, by codec; nothing by default.

    A number is that of the megapixels that must be decoded at least to get a video's frames: the
    pictures from each keyframe needed up to the last wanted frame behind it, times their size.
    `vllm-mm bench decoders` measures on a machine with a GPU from how many on the GPU is the faster
    one, and prints these settings.
    """

    h264: float | None = Field(None, gt=0, description="Megapixels of H.264; null: on the CPU.")
    hevc: float | None = Field(None, gt=0, description="Megapixels of HEVC; null: on the CPU.")
    vp9: float | None = Field(None, gt=0, description="Megapixels of VP9; null: on the CPU.")
    av1: float | None = Field(None, gt=0, description="Megapixels of AV1; null: on the CPU.")


class NvdecConfig(Section):
    """Decoding on the video engines of NVIDIA GPUs, those that `CUDA_VISIBLE_DEVICES` names."""

    sessions: int = Field(
        2,
        ge=1,
        le=64,
        description="Decode workers per GPU and API server that may use the GPU. Each holds a CUDA "
        "context there, which takes memory that `--gpu-memory-utilization` must leave free.",
    )
    memory_mb: int = Field(
        512,
        ge=16,
        le=1 << 16,
        description="GPU memory for the pictures of one worker, beside the context, MiB; a video "
        "that needs more is decoded on the CPU.",
    )
    from_megapixels: NvdecThresholds = Field(default_factory=NvdecThresholds)


# Most that ``decode.max_output_mb`` may be.
MAX_OUTPUT_MB = 1 << 16


class DecodeConfig(Section):
    """The pool of decode worker processes and its hard limits per job."""

    backend: Literal["auto", "pyav", "decord", "nvdec"] = Field(
        "auto",
        description="Decoder; `auto` is the measured best (docs/decoders.md). `nvdec`: on a GPU "
        "what the GPU can decode; the rest, and what fails there, on the CPU.",
    )
    workers: int = Field(
        0,
        ge=0,
        le=256,
        description="Decodes at a time per API server, and probes of containers beside them, each "
        "in a worker process; 0: one per core, at most 8.",
    )
    threads: int = Field(
        0, ge=0, le=64, description="FFmpeg threads per job; 0: one per core, shared by the jobs."
    )
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
        4 * 3600.0,
        gt=0,
        description="Seconds of video; longer is refused, by `long_video` too.",
    )
    max_output_mb: int = Field(
        1024,
        ge=16,
        le=MAX_OUTPUT_MB,
        description="Decoded frames of one video, MiB; more is refused. vLLM 0.33 also bounds all "
        "media of a request: VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES, 682 MiB by default.",
    )
    nvdec: NvdecConfig = Field(default_factory=NvdecConfig)


class CacheConfig(Section):
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
        description="Seconds media waits for room in the media budget, or among the downloads from "
        "its host, before its request is refused with a 503. Without a client who could send the "
        "request again (`LLM`, `vllm run-batch`) media waits without end.",
    )


class FetchConfig(Section):
    """Where media may come from, beside vLLM's `--allowed-media-domains`, and how large they are.

    Link-local addresses and the metadata services of clouds are refused whatever is set here.
    The size of downloads is bounded by vLLM's VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB (256).
    """

    private_addresses: Literal["allow", "refuse"] = Field(
        "allow",
        description="`allow`: as stock vLLM, clients may name loopback and private addresses. "
        "`refuse`: not those; for servers whose clients are not trusted.",
    )
    max_local_mb: int = Field(
        4096,
        ge=1,
        le=1 << 20,
        description="Of a local file, or of a `data:` URL, MiB: larger ones are refused. For "
        "`audio_url` and `input_audio`, VLLM_MAX_AUDIO_CLIP_FILESIZE_MB (25) holds as well, "
        "wherever the file is. All of a file is in memory while it is decoded.",
    )


class AudioConfig(Section):
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
        "error",
        description="What happens to an audio item past the limit: a 413, or it is cut there. The "
        "sound of a video is always cut.",
    )
    audio_stream: int | None = Field(
        None,
        ge=0,
        le=999,
        description="Which of a file's audio streams, counted from 0; null: the one that players "
        "play. Files with sound but without that stream are refused.",
    )


class PictureConfig(Section):
    """How pictures are shown where players differ, or the footage leaves it open."""

    pixel_aspect: Literal["stretch", "keep"] = Field(
        "stretch",
        description="Video whose pixels are not square (DVD, DV, broadcast): `stretch` to its "
        "display shape, as players do; `keep` the pixels as stored, as stock vLLM does.",
    )
    background: str = Field(
        "#000000",
        pattern=r"^#[0-9a-fA-F]{6}$",
        description="Colour behind transparent video (WebM, GIF, APNG, ProRes 4444) and beside "
        "pictures whose shape is not the first one's, `#rrggbb`.",
    )


class MediaConfig(Section):
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
    picture: PictureConfig = Field(default_factory=PictureConfig)

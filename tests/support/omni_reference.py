"""Processors of tiny omni checkpoints: this plugin's, stock vLLM's and transformers' own."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.media import MediaWithBytes

from vllm_mm_ext import plugin
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.testing.checkpoints import checkpoint

RATE = 16_000


@cache
def model_config(family: str, audio_limit: int = 8) -> ModelConfig:
    # vLLM remembers by the configuration which class a model has: for the other tests as well.
    plugin.register()
    return ModelConfig(
        model=str(checkpoint(family)),
        max_model_len=16_384,
        limit_mm_per_prompt={"audio": audio_limit, "video": 8, "image": 8},
        mm_processor_cache_gb=1,
    )


def make_processor(family: str, model_class: Any, **config: int) -> Any:
    """The processor registered for a model class, on a family's tiny checkpoint."""
    info_config = model_config(family, **config)
    factory = model_class._processor_factory
    ctx = MULTIMODAL_REGISTRY._create_processing_ctx(info_config, None)
    return factory.build_processor(ctx)


def new_cache(family: str) -> MultiModalProcessorOnlyCache:
    return MultiModalProcessorOnlyCache(model_config(family))


def pixels(num_frames: int, height: int = 56, width: int = 84, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (num_frames, height, width, 3), dtype=np.uint8)


def sound(seconds: float, seed: int = 0) -> Waveform:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(int(seconds * RATE)).astype(np.float32) * 0.1
    return Waveform(samples, digest=f"sound-{seconds}-{seed}", rate=RATE)


def even(num_frames: int, fps: float) -> list[float]:
    """Times of frames at a fixed rate."""
    return [i / fps for i in range(num_frames)]


def video(
    frames: np.ndarray,
    times: Any = None,
    track: Waveform | None = None,
    digest: str = "",
    reduction: Reduction = NO_REDUCTION,
) -> MediaWithBytes:
    """A video as the media connector delivers it: frames at a fixed rate from 0 on have a step."""
    times = None if times is None else tuple(float(t) for t in times)
    step = times[1] if times and len(times) > 1 else None
    if step and not np.allclose(times, step * np.arange(len(times))):
        step = None
    digest = digest or f"video-{frames.shape}-{int(frames[0, 0, 0, 0])}-{times}"
    if track is not None:
        digest += f"+{track.digest}"
    sampled = SampledFrames(
        frames, digest=digest, times=times, audio=track, step=step, reduction=reduction
    )
    fps = (len(frames) - 1) / times[-1] if times and len(frames) > 1 and times[-1] else 2.0
    metadata = {
        "total_num_frames": len(frames),
        "fps": fps,
        "duration": len(frames) / fps,
        "video_backend": "mm_ext",
        "frames_indices": list(range(len(frames))),
        "do_sample_frames": False,
    }
    return MediaWithBytes((sampled, metadata), digest.encode())


def render(
    processor: Any,
    prompt: str,
    data: dict[str, Any],
    uuids: dict[str, Any] | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """What the API server makes of a prompt and its media."""
    items = processor.info.parse_mm_data(data)
    return processor(prompt, items, uuids or {}, kwargs, cache=cache)


def features(result: dict[str, Any]) -> list[MultiModalFeatureSpec]:
    """The features a model runner sees, by ascending offset."""
    made = [
        MultiModalFeatureSpec(data=item, modality=modality, identifier=h, mm_position=place)
        for modality, places in result["mm_placeholders"].items()
        for item, h, place in zip(
            result["mm_kwargs"][modality], result["mm_hashes"][modality], places, strict=True
        )
    ]
    return sorted(made, key=lambda f: f.mm_position.offset)


def positions(model_class: Any, processor: Any, result: dict[str, Any]) -> tuple[Any, int]:
    """M-RoPE positions a model class gives a prompt, and its delta (no weights are needed)."""
    model = object.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.config = processor.info.get_hf_config()
    found, delta = model.get_mrope_input_positions(result["prompt_token_ids"], features(result))
    return found.numpy(), delta


def rope_index(hf_class: Any, config: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """transformers' positions ``[3, tokens]`` and delta for a prompt."""
    model = SimpleNamespace(
        config=config, spatial_merge_size=config.vision_config.spatial_merge_size
    )
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        if hasattr(hf_class, name):
            setattr(model, name, getattr(hf_class, name).__get__(model))
    ids = input_ids.reshape(1, -1)
    found, delta = hf_class.get_rope_index(
        model, input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs
    )
    return found[:, 0].numpy(), int(delta)


def without_video(by_modality: Any) -> dict[str, Any]:
    """Everything but the videos, which are other items than stock's: segments."""
    return {kind: values for kind, values in by_modality.items() if kind != "video"}

"""What this instance makes of media: the plan that all which share encoder outputs must have."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from vllm.version import __version__ as vllm_version

from vllm_mm_ext.adapters.encoder_cache.transport_options import (
    TransportError,
    shared_directory,
)
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.fleet.model_identity import model_identity
from vllm_mm_ext.fleet.pairing import join

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Sections of the configuration that decide which segments there are and what they hold.
_MEDIA_PARTS = ("enabled", "resize", "sampling", "audio", "picture")
# What a load tier makes of a video.
_TIER_PARTS = ("resolution", "frame_rate")


def join_shared_store(vllm_config: VllmConfig) -> None:
    """Join the instances that share the store's directory.

    Raises:
        PairingError: They make other outputs; says what differs.
    """
    join(shared_directory(vllm_config), plan_of(vllm_config))


def plan_of(vllm_config: VllmConfig) -> dict[str, Any]:
    """The plan of this instance.

    Raises:
        TransportError: It was not made at start-up, so items are not named by it.
    """
    kept = kept_plan(vllm_config.model_config)
    if kept is None:
        raise TransportError(
            "encoder outputs are not shared: the plugin did not take part when the engine's "
            "configuration was made; is it named in VLLM_PLUGINS?"
        )
    return kept


def kept_plan(model_config: Any) -> dict[str, Any] | None:
    """The plan that travels with a ``ModelConfig``; None where no outputs are shared."""
    kept = getattr(model_config, "mm_ext_plan", None)
    return kept if isinstance(kept, dict) else None


def made_plan(vllm_config: VllmConfig) -> dict[str, Any]:
    """What the configuration makes of media."""
    model = vllm_config.model_config
    media: Any = model.multimodal_config
    settings = MMExtConfig.from_additional_config(vllm_config.additional_config)
    return {
        "model": _identity(model.model, model.revision),
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "vllm": vllm_version,
        "mm_ext": _own_version(),
        "max_model_len": model.max_model_len,
        # A dictionary of the command line, or a function of somebody's program.
        "hf_overrides": model.hf_overrides
        if isinstance(model.hf_overrides, dict)
        else getattr(model.hf_overrides, "__qualname__", ""),
        "mm_encoder_attn_dtype": media.mm_encoder_attn_dtype,
        "mm_encoder_fp8_scales": _file_digest(media.mm_encoder_fp8_scale_path),
        "mm_processor_kwargs": _without_device(media.mm_processor_kwargs or {}),
        "media_io_kwargs": {
            modality: kept
            for modality, options in media.media_io_kwargs.items()
            if (kept := _without_device(options))
        },
        "video_pruning_rate": media.video_pruning_rate,
        "mm_hasher_algorithm": media.mm_hasher_algorithm,
        **{f"media.{name}": settings.media.model_dump(mode="json")[name] for name in _MEDIA_PARTS},
        "segments": settings.segments.model_dump(mode="json"),
        # The server's default counts also where it is what it would be anyway.
        "compression.reduction": settings.compression.default_reduction(None).key(),
        "quality.budget": settings.quality.budget.model_dump(mode="json"),
        # Who asks an encoder tells the number of the tier, and each looks up what that means.
        **{f"quality.tiers.{name}": getattr(settings.quality.tiers, name) for name in _TIER_PARTS},
        "quality.bounds.max_total_tokens": settings.quality.bounds.max_total_tokens,
    }


def _without_device(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without where the work is done: vLLM sets that on encoders alone."""
    return {
        key: value
        for key, value in options.items()
        if key != "device" and (key, value) != ("backend", "torchcodec")
    }


def _file_digest(path: str | None) -> str | None:
    return None if path is None else blake3(Path(path).read_bytes()).hexdigest()


def _identity(model: str, revision: str | None) -> str:
    if Path(model).is_dir():
        return model_identity(Path(model))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return model_identity(Path(found).parent) if isinstance(found, str) else f"{model}@{revision}"


def _own_version() -> str:
    try:
        return version("vllm_mm_ext")
    except PackageNotFoundError:
        return "unknown"

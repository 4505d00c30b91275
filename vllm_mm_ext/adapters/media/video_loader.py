"""The plugin's sampling as a vLLM video loader (``video_backend: mm_ext``).

The plugin's own connector does not need it; it serves vLLM's stock connector, and code that
hands encoded bytes to vLLM directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from vllm import envs
from vllm.multimodal.video import VideoLoader

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.media.media_connector import VIDEO_KEYS, metadata_of
from vllm_mm_ext.adapters.media.video_kwargs import (
    CODEC_KEYS,
    VideoOptionError,
    read_video_kwargs,
    sampling_for,
    spec_for,
)
from vllm_mm_ext.adapters.runtime import current_runtime
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.fetch.source import Fetched
from vllm_mm_ext.media.video_plan import VideoPlan

# vLLM passes this on where nobody says otherwise. So to the loader it is a ceiling only.
_STOCK_NUM_FRAMES = 32


class MMExtVideoLoader(VideoLoader):  # type: ignore[misc]
    """Samples and decodes encoded bytes with a front-end of this process.

    vLLM names no engine here: with several engines in a process this is the front-end of the last.
    """

    @classmethod
    def load_bytes(cls, data: bytes, **kwargs: Any) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        """Decode sampled frames.

        Args:
            data: The encoded file.
            **kwargs: ``media_io_kwargs.video``, see ``VideoKwargs``.

        Returns:
            Frames uint8 ``[n, height, width, 3]`` and vLLM's video metadata.

        Raises:
            VLLMError: The bytes cannot be served as video, or a key is unknown or out of bounds.
        """
        runtime = current_runtime()
        if kwargs.get("num_frames") == _STOCK_NUM_FRAMES:
            most = min(kwargs.pop("num_frames"), kwargs.get("max_frames") or _STOCK_NUM_FRAMES)
            kwargs["max_frames"] = most
        with client_errors():
            sampling = sampling_for(runtime.config.media.sampling, read_video_kwargs(kwargs))
        spec = spec_for(sampling, runtime.frontend.traits.frame_multiple)
        plan = VideoPlan(spec, runtime.frontend.size_rule, reduction=runtime.default_reduction)
        with client_errors():
            ref = MediaRef(Fetched.of(Blob.from_bytes(data)), _already_read, runtime.budget.claim())
            result = runtime.run_blocking(runtime.frontend.video(ref, plan))
        digest = result.frames.digest or ""
        return result.frames, metadata_of(result.info, result.selection, digest)


def check_server_kwargs(kwargs: Mapping[str, Any], additional_config: object) -> None:
    """Check ``media_io_kwargs.video`` of a server where the plugin is in charge of it.

    Args:
        kwargs: ``media_io_kwargs.video``.
        additional_config: vLLM's setting of that name.

    Raises:
        ValueError: A key is unknown or out of bounds; the message names it.
    """
    own = {key: value for key, value in kwargs.items() if key != "video_backend"}
    chosen = kwargs.get("video_backend")
    if (chosen or envs.VLLM_VIDEO_LOADER_BACKEND) != vllm_compat.LOADER_NAME:
        connected = (
            chosen is None
            and envs.VLLM_MEDIA_CONNECTOR == vllm_compat.CONNECTOR_NAME
            and MMExtConfig.from_additional_config(additional_config).media.enabled
        )
        if not connected:
            return
        if others := sorted(own.keys() - VIDEO_KEYS):
            vllm_compat.logger.warning(
                "mm_ext: vLLM's own loader reads all videos, since media_io_kwargs.video has %s, "
                "which only vLLM's loaders know",
                ", ".join(others),
            )
            return
    try:
        read_video_kwargs(own)
    except VideoOptionError as error:
        raise ValueError(
            f"{error.message}. Sampling can also be set by "
            "additional_config.mm_ext.media.sampling, with the keys fps, min_frames, max_frames."
        ) from None
    unused = sorted(own.keys() & CODEC_KEYS)
    if unused:
        vllm_compat.logger.warning(
            "mm_ext: %s in media_io_kwargs.video has no effect: the plugin decodes by itself, see "
            "additional_config.mm_ext.media.decode",
            ", ".join(unused),
        )


async def _already_read(_: Claim) -> Blob:
    raise AssertionError("the bytes were given; nothing can ask for them again")

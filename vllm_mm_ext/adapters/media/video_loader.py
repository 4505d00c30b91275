"""The plugin's sampling as a vLLM video loader (``video_backend: mm_ext``).

The plugin's own connector does not need it; it serves vLLM's stock connector, and code that
hands encoded bytes to vLLM directly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.multimodal.video import VideoLoader

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.media.media_connector import metadata_of, sampling_with, spec_for
from vllm_mm_ext.adapters.runtime import current_runtime
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.fetch.source import Fetched
from vllm_mm_ext.media.video_plan import VideoPlan


class MMExtVideoLoader(VideoLoader):  # type: ignore[misc]
    """Samples and decodes encoded bytes with the front-end of the process."""

    @classmethod
    def load_bytes(cls, data: bytes, **kwargs: Any) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        """Decode sampled frames.

        Args:
            data: The encoded file.
            **kwargs: ``fps``, ``num_frames``, ``min_frames``, ``max_frames`` override the
                configured sampling; ``num_frames`` is the ceiling.

        Returns:
            Frames uint8 ``[n, height, width, 3]`` and vLLM's video metadata.

        Raises:
            VLLMError: The bytes cannot be served as video.
        """
        runtime = current_runtime()
        sampling = sampling_with(runtime.config.media.sampling, kwargs)
        spec = spec_for(sampling, runtime.frontend.traits.frame_multiple)
        plan = VideoPlan(spec, runtime.frontend.size_rule, reduction=runtime.default_reduction)
        with client_errors():
            ref = MediaRef(Fetched.of(Blob.from_bytes(data)), _already_read, runtime.budget.claim())
            result = runtime.run_blocking(runtime.frontend.video(ref, plan))
        digest = result.frames.digest or ""
        return result.frames, metadata_of(result.info, result.selection, digest)


async def _already_read() -> Blob:
    raise AssertionError("the bytes were given; nothing can ask for them again")

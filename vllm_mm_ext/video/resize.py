"""Resizing of frames by the rule of a model's video processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def resized(
    video_processor: Any, frames: npt.NDArray[np.uint8], size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Resize frames as the video processor resizes them.

    Args:
        video_processor: transformers video processor of the model.
        frames: uint8 RGB ``[n, height, width, 3]``.
        size: New ``(height, width)`` in pixels.

    Returns:
        uint8 RGB ``[n, *size, 3]``.
    """
    from transformers.image_processing_backends import TorchvisionBackend
    from transformers.image_utils import SizeDict

    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    # The family's own ``resize`` would choose a size by itself.
    resize = TorchvisionBackend.resize
    out = resize(
        video_processor,
        image=channels_first,
        size=SizeDict(height=size[0], width=size[1]),
        resample=video_processor.resample,
    )
    back: npt.NDArray[np.uint8] = out.permute(0, 2, 3, 1).contiguous().numpy()
    return back

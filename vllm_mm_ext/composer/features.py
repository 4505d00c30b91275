"""What the composer's encoders take: pixels as SigLIP's, log-mel spectrograms as Whisper's.

Used by the processors and by training, so that both encode the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.media.audio.waveforms import log_mel


def pixel_values(frames: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Frames as the vision tower takes them, from -1 to 1.

    Args:
        frames: RGB ``[n, side, side, 3]``, at the tower's own size.

    Returns:
        float32 ``[n, 3, side, side]``.
    """
    channels_first = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    return channels_first.contiguous().float().div_(127.5).sub_(1.0)


def mel_windows(config: ComposerConfig, samples: npt.NDArray[np.float32]) -> list[torch.Tensor]:
    """Log-mel spectrogram of each window of a waveform, computed window by window.

    A window does not depend on what sounds before or after it, so that a longer version of a clip
    keeps the windows it shares.

    Args:
        config: Of the checkpoint.
        samples: float32 mono at 16 kHz, at least one.

    Returns:
        float32 ``[bins, frames]`` of each window. With ``config.audio_pad_windows`` silence follows
        up to the end of a window; otherwise the last may be shorter, one frame per 10 ms begun.
    """
    window = config.window_samples
    return [
        torch.from_numpy(
            log_mel(
                samples[begin : begin + window],
                n_mels=config.audio_config.num_mel_bins,
                pad_to=window if config.audio_pad_windows else "clip",
            )
        )
        for begin in range(0, len(samples), window)
    ]

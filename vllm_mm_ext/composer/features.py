"""Inputs of the composer's encoders: pixels for SigLIP, log-mel spectrograms for Whisper.

The vLLM processor and training both use this module, so both encode the same inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.media.audio.waveforms import log_mel


def pixel_values(frames: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Frames as the vision tower takes them.

    Args:
        frames: uint8 RGB ``[n, side, side, 3]``, at the size that the tower takes.

    Returns:
        float32 ``[n, 3, side, side]`` from -1 to 1.
    """
    channels_first = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    return channels_first.contiguous().float().div_(127.5).sub_(1.0)


def mel_windows(config: ComposerConfig, samples: npt.NDArray[np.float32]) -> list[torch.Tensor]:
    """Log-mel spectrogram of each window of a waveform, computed window by window.

    A window does not depend on the sound before or after it, so a longer version of a clip has the
    same windows as far as the sound is the same.

    Args:
        config: Configuration of the checkpoint.
        samples: float32 mono at 16 kHz, at least one sample.

    Returns:
        float32 ``[bins, frames]`` of each window. With ``config.audio_pad_windows`` the last window
        is filled up with silence; otherwise it has one frame for each 10 ms begun.
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

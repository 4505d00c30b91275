"""The composer's sound as mm items, cut at the windows of the audio encoder.

The embeddings of a window depend only on the window's samples and on the time at which the window
begins. So sound without a video becomes one mm item per window, and the windows of a video's sound
become parts of the video's segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from vllm_mm_ext.composer.configuration import SAMPLE_RATE, ComposerConfig
from vllm_mm_ext.composer.features import mel_windows
from vllm_mm_ext.media.payload import Waveform


class SoundPiece(Waveform):
    """Consecutive windows of a sound, identified by their samples and their place in the sound.

    Attributes:
        first: Index of the first of these windows in the sound.
    """

    first: int

    @classmethod
    def cut(cls, samples: npt.NDArray[np.float32], windows: range, config: ComposerConfig) -> Self:
        """Cut windows out of a sound.

        Args:
            samples: float32 mono samples of the whole sound at 16 kHz.
            windows: Indices of the windows.
            config: Configuration of the checkpoint.
        """
        begin, end = (number * config.window_samples for number in (windows.start, windows.stop))
        own = np.ascontiguousarray(np.asarray(samples, np.float32)[begin:end])
        hasher = blake3(f"composer-sound|{windows.start}|".encode())
        self = cls(
            own, digest=str(hasher.update(own.view(np.uint8).data).hexdigest()), rate=SAMPLE_RATE
        )
        self.first = windows.start
        return self

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.first = 0


def encoder_inputs(config: ComposerConfig, piece: Waveform | None) -> dict[str, torch.Tensor]:
    """Inputs of the audio encoder for some windows.

    Args:
        config: Configuration of the checkpoint.
        piece: The windows, a `SoundPiece`; None for no sound.

    Returns:
        ``mel``: float32 ``[bins, frames]``, the spectrograms of all windows side by side.
        ``mel_lengths``: int64 ``[windows]``, spectrogram frames of each window.
        ``states``: int64 ``[windows]``, encoder frames of each window that are not padding.
        ``first_window``: int64 ``[]``, index of the first window in the sound.
    """
    none = torch.empty(0, dtype=torch.int64)
    if piece is None:
        bins = 0 if config.audio_config is None else int(config.audio_config.num_mel_bins)
        return {
            "mel": torch.empty(bins, 0),
            "mel_lengths": none,
            "states": none,
            "first_window": torch.tensor(0),
        }
    windows = mel_windows(config, np.asarray(piece))
    return {
        "mel": torch.cat(windows, dim=1),
        "mel_lengths": torch.tensor([mel.shape[1] for mel in windows]),
        "states": torch.tensor(config.audio_states(len(piece))),
        "first_window": torch.tensor(piece.first if isinstance(piece, SoundPiece) else 0),
    }


AUDIO_FIELDS = ("mel", "mel_lengths", "states", "first_window")
"""Keys of `encoder_inputs`. As fields of an mm item they get the modality in front: ``video_mel``.
"""


def fields_of(
    config: ComposerConfig, modality: str, pieces: Sequence[Waveform | None], dtype: torch.dtype
) -> dict[str, Any]:
    """Sound fields of some mm items.

    Args:
        config: Configuration of the checkpoint.
        modality: ``video`` or ``audio``, the modality of the items.
        pieces: Windows of sound of each item; None for an item without sound.
        dtype: Type of ``mel``.

    Returns:
        Field name to one value per item.
    """
    made = [encoder_inputs(config, piece) for piece in pieces]
    for one in made:
        one["mel"] = one["mel"].to(dtype)
    return {f"{modality}_{key}": [one[key] for one in made] for key in AUDIO_FIELDS}

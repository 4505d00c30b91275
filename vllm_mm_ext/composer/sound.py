"""Sound of the composer as mm items: whole windows of the audio encoder.

A window depends on nothing but its own samples and when it begins. So sound by itself becomes an mm
item per window, and the sound of a video a part of its segments.
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
    """Some windows of a sound, identified by their samples and their place.

    Attributes:
        first: Number of the first window in its sound.
    """

    first: int

    @classmethod
    def cut(cls, samples: npt.NDArray[np.float32], windows: range, config: ComposerConfig) -> Self:
        """Those windows of a whole sound at 16 kHz."""
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
    """What the audio encoder is told about some windows.

    Args:
        config: Of the checkpoint.
        piece: A `SoundPiece`; None for silence.

    Returns:
        ``mel`` float32 ``[bins, frames]`` of all windows side by side, ``mel_lengths`` int64
        ``[windows]`` frames of each, ``states`` int64 ``[windows]`` encoder frames that are not
        padding, ``first_window`` int64 ``[]``.
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
"""Keys of `encoder_inputs`; as fields of an mm item they follow its modality: ``video_mel``."""


def fields_of(
    config: ComposerConfig, modality: str, pieces: Sequence[Waveform | None], dtype: torch.dtype
) -> dict[str, Any]:
    """Fields of some mm items: one value each."""
    made = [encoder_inputs(config, piece) for piece in pieces]
    for one in made:
        one["mel"] = one["mel"].to(dtype)
    return {f"{modality}_{key}": [one[key] for one in made] for key in AUDIO_FIELDS}

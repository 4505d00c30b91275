"""Pieces of a sound track, with their log-mel frames from the spectrogram of the whole track."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from blake3 import blake3

from vllm_mm_ext.media.payload import Waveform

# Log-mel frames per second: 16 kHz, hop 160 (Whisper's front end, which the families share).
MEL_RATE = 100


class AudioWindow(NamedTuple):
    """A window of an audio encoder. The encoder attends within windows: sound is cut between them.

    Attributes:
        tokens: Audio tokens of a window.
        mel_frames: Log-mel frames of a window.
        least: Fewest audio tokens of a piece that the encoder encodes as it does within the whole.
    """

    tokens: int
    mel_frames: int
    least: int

    @property
    def seconds(self) -> float:
        """Seconds of a window."""
        return self.mel_frames / MEL_RATE


class TrackPiece(Waveform):
    """A piece of a track as an audio item.

    Attributes:
        mel: Log-mel frames ``[bins, frames]``, cut from the spectrogram of the whole track.
    """

    mel: torch.Tensor

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.mel = torch.empty(0, 0)


def piece_of(track: Waveform, mel: torch.Tensor) -> TrackPiece:
    """An audio item for some log-mel frames of a track.

    The model hears the log-mel frames, so the item's digest is made of them. Of the samples the
    item has only one, so that it is not empty.

    Args:
        track: The whole track.
        mel: The piece's log-mel frames ``[bins, frames]``.
    """
    hasher = blake3(repr(tuple(mel.shape)).encode())
    hasher.update(mel.contiguous().numpy().tobytes())
    piece = TrackPiece(
        np.asarray(track)[:1], digest=f"mel:{hasher.hexdigest()}", rate=track.rate or 0
    )
    piece.mel = mel
    return piece

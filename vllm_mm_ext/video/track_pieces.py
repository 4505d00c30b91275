"""Pieces of a sound track, with the log-mel frames they have in the whole."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from blake3 import blake3

from vllm_mm_ext.media.payload import Waveform

# Log-mel frames per second: 16 kHz, hop 160 (Whisper's front end, which the families share).
MEL_RATE = 100


class AudioWindow(NamedTuple):
    """Where an audio encoder may be cut.

    Attributes:
        tokens: Audio tokens of a window that is attended within.
        mel_frames: Log-mel frames of a window.
        least: Audio tokens that a piece needs for the encoder to see it as it sees the whole.
    """

    tokens: int
    mel_frames: int
    least: int

    @property
    def seconds(self) -> float:
        """Length of a window."""
        return self.mel_frames / MEL_RATE


class TrackPiece(Waveform):
    """A piece of a track as an audio item.

    Attributes:
        mel: Log-mel frames ``[bins, frames]``, cut from those of the whole track.
    """

    mel: torch.Tensor

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.mel = torch.empty(0, 0)


def piece_of(track: Waveform, mel: torch.Tensor) -> TrackPiece:
    """An audio item for some log-mel frames of a track.

    What the model hears are the frames, so they are its identity; the samples only stand for an
    item with something in it.
    """
    hasher = blake3(repr(tuple(mel.shape)).encode())
    hasher.update(mel.contiguous().numpy().tobytes())
    piece = TrackPiece(
        np.asarray(track)[:1], digest=f"mel:{hasher.hexdigest()}", rate=track.rate or 0
    )
    piece.mel = mel
    return piece

"""Sound as PCM of 16 bits, and as WAV files."""

from __future__ import annotations

import wave
from typing import IO

import numpy as np
import numpy.typing as npt


def pcm16(samples: npt.NDArray[np.float32]) -> bytes:
    """Samples in -1..1 as little-endian PCM of 16 bits; what is beyond is clipped."""
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2").tobytes()


def write_wav(file: str | IO[bytes], pcm: bytes, rate: int) -> None:
    """Write a WAV file.

    Args:
        file: Its path, or where its bytes go.
        pcm: Little-endian PCM of 16 bits, mono.
        rate: Samples per second.
    """
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(pcm)

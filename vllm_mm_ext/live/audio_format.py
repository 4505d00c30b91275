"""Audio formats of the Realtime protocol, and their samples."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt


class AudioFormat(StrEnum):
    """How a session's input audio is written; the values are the protocol's names."""

    PCM16 = "audio/pcm"
    MU_LAW = "audio/pcmu"
    A_LAW = "audio/pcma"

    @property
    def rate(self) -> int:
        """Samples per second."""
        return 24_000 if self is AudioFormat.PCM16 else 8_000

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample."""
        return 2 if self is AudioFormat.PCM16 else 1

    def samples(self, audio: bytes) -> npt.NDArray[np.float32]:
        """The samples of whole-sample bytes: float32 ``[n]`` in -1..1.

        Args:
            audio: Little-endian 16-bit samples, or bytes of G.711.

        Raises:
            ValueError: The bytes end within a sample.
        """
        if self is AudioFormat.PCM16:
            return np.frombuffer(audio, "<i2").astype(np.float32) / np.float32(2**15)
        table = _MU_LAW if self is AudioFormat.MU_LAW else _A_LAW
        return table[np.frombuffer(audio, np.uint8)]


def _mu_law() -> npt.NDArray[np.float32]:
    """The sample of each mu-law byte (ITU-T G.711): sign, 3 bits of exponent, 4 of mantissa."""
    code = ~np.arange(256, dtype=np.int32) & 0xFF
    magnitude = (((code & 0x0F) << 3) + 0x84 << ((code & 0x70) >> 4)) - 0x84
    return (np.where(code & 0x80, -magnitude, magnitude) / 2**15).astype(np.float32)


def _a_law() -> npt.NDArray[np.float32]:
    """The sample of each A-law byte (ITU-T G.711), whose even bits are inverted."""
    code = np.arange(256, dtype=np.int32) ^ 0x55
    exponent, mantissa = (code & 0x70) >> 4, code & 0x0F
    first = (mantissa << 4) + 8
    magnitude = np.where(exponent, first + 0x100 << np.maximum(exponent - 1, 0), first)
    return (np.where(code & 0x80, magnitude, -magnitude) / 2**15).astype(np.float32)


_MU_LAW, _A_LAW = _mu_law(), _a_law()

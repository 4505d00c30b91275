"""Resamples sound that arrives in pieces as if it had come whole."""

from __future__ import annotations

import av
import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

_NONE = np.zeros(0, np.float32)
_NONE.setflags(write=False)


class StreamResampler:
    """Resamples one stream with FFmpeg, whatever the lengths of its pieces.

    All that comes out up to a ``flush`` is, sample for sample, what the sound since the last one
    gives in one piece. Until the flush, FFmpeg holds back a millisecond (24 to 16 kHz) or two
    (8 to 16 kHz). For one thread at a time.

    Args:
        rate: Sampling rate in Hz of what comes in.
        target: Sampling rate in Hz of what comes out.
    """

    def __init__(self, rate: int, target: int) -> None:
        self._rate, self._target = rate, target
        self._taken = 0
        self._given = 0
        self._resampler: av.AudioResampler | None = None

    def push(self, samples: Samples) -> Samples:
        """Take the next samples; return those that are ready, float32 ``[n]``.

        Args:
            samples: float32 mono ``[n]``, finite; may be empty.
        """
        self._taken += len(samples)
        if self._rate == self._target or not len(samples):
            self._given += len(samples)
            return samples
        if self._resampler is None:
            self._resampler = av.AudioResampler(format="flt", layout="mono", rate=self._target)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], "flt", "mono")
        frame.sample_rate = self._rate
        return self._given_of(self._resampler.resample(frame))

    def flush(self) -> Samples:
        """Return what was held back; what comes next begins anew.

        After a flush as many samples have come out as went in, at their rate and rounded down.
        """
        resampler, self._resampler = self._resampler, None
        if resampler is None:
            return _NONE
        held = self._joined(resampler.resample(None))[: self.taken - self._given]
        # FFmpeg gives nothing back of a stream that is shorter than its filter.
        samples = np.zeros(self.taken - self._given, np.float32)
        samples[: len(held)] = held
        self._given = self.taken
        return samples

    def drop(self) -> None:
        """Forget what was held back."""
        self._resampler = None
        self._given = self.taken

    @property
    def taken(self) -> int:
        """How much has come in, in samples at the target rate, rounded down."""
        return self._taken * self._target // self._rate

    @property
    def given(self) -> int:
        """Samples that have come out, with those dropped."""
        return self._given

    def _given_of(self, frames: list[av.AudioFrame]) -> Samples:
        samples = self._joined(frames)
        self._given += len(samples)
        return samples

    @staticmethod
    def _joined(frames: list[av.AudioFrame]) -> Samples:
        chunks = [frame.to_ndarray()[0] for frame in frames]
        return np.concatenate(chunks) if len(chunks) > 1 else chunks[0] if chunks else _NONE

"""Resamples with FFmpeg, for decode workers and for rates that other resamplers cannot take."""

from __future__ import annotations

import math

import av
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame

from vllm_mm_ext.errors import UnreadableMediaError

# Channels, each in a plane of its own, that PyAV cannot read; see ``Packer``.
_UNREADABLE_CHANNELS = 8


def convert_rate(
    waveform: npt.NDArray[np.float32], rate: int, target: int
) -> npt.NDArray[np.float32]:
    """Resample a waveform with FFmpeg, which takes no more memory for one ratio than another.

    Args:
        waveform: float32 mono ``[samples]``.
        rate: Sampling rate of the waveform in Hz.
        target: Sampling rate of the result in Hz.

    Returns:
        float32 ``[ceil(samples * target / rate)]``.
    """
    resampler = av.AudioResampler(format="flt", layout="mono", rate=target)
    frame = av.AudioFrame.from_ndarray(np.asarray(waveform, np.float32)[None], "flt", "mono")
    frame.sample_rate = rate
    chunks = [chunk.to_ndarray()[0] for step in (frame, None) for chunk in resampler.resample(step)]
    wanted = math.ceil(len(waveform) * target / rate)
    samples = np.zeros(wanted, np.float32)
    joined = np.concatenate(chunks)[:wanted] if chunks else samples[:0]
    samples[: len(joined)] = joined
    return samples


class Packer:
    """Puts the channels of frames beside each other, where PyAV cannot read them one by one.

    Of a frame that has a plane for each of 8 or more channels, PyAV 18.1 takes what lies behind the
    list of planes for planes too, and crashes. For one thread.
    """

    def __init__(self) -> None:
        self._kind: tuple[object, ...] = ()
        self._resampler: av.AudioResampler | None = None

    def readable(self, frame: AudioFrame) -> AudioFrame:
        """The frame itself, or one with the same samples; its timestamp may be another.

        Raises:
            UnreadableMediaError: FFmpeg does not convert the frame.
        """
        channels = frame.layout.nb_channels
        if not frame.format.is_planar or channels < _UNREADABLE_CHANNELS:
            return frame
        kind = (frame.format.name, channels, frame.layout.name, frame.sample_rate, frame.time_base)
        if self._resampler is None or kind != self._kind:
            self._kind = kind
            self._resampler = av.AudioResampler(
                format=frame.format.packed.name, layout=frame.layout, rate=frame.sample_rate
            )
        packed = self._resampler.resample(frame)
        if len(packed) != 1 or packed[0].samples != frame.samples:
            raise UnreadableMediaError(
                "The channels of the audio could not be read.", parameter="input_audio"
            )
        return packed[0]

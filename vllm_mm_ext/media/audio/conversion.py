"""Resamples with FFmpeg, for decode workers and for rates that other resamplers cannot take."""

from __future__ import annotations

import math

import av
import numpy as np
import numpy.typing as npt


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

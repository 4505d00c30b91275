"""Mixes the channels of decoded sound to one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame

# Beyond any headroom: 120 dB above full scale.
_MAX_AMPLITUDE = 1e6
# NumPy's names of FFmpeg's sample formats, and full scale of the signed integer ones.
_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
_FULL_SCALE = {"s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}
# Share of a speaker in the mix (ITU-R BS.775: what is heard from the side or behind is 3 dB below
# the fronts, which are 3 dB below the centre; the effects channel is left out).
_WEIGHTS = {"FC": 1.0} | dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR"), 0.5**0.5)
_WEIGHTS |= dict.fromkeys(("LFE", "LFE2"), 0.0)
_SURROUND = 0.5
_UNNAMED = frozenset({"NONE", "UNSD", "UNK", ""})


def to_mono(frames: Sequence[AudioFrame]) -> list[npt.NDArray[np.float32]]:
    """The samples of frames as float32 in -1..1, mixed to one channel.

    One and two channels, and channels whose speakers are not known, are averaged; others are
    weighted by speaker, with weights that add up to 1.

    Args:
        frames: Frames of one format and layout, one at least. To mix many of them costs little more
            than to mix one.

    Returns:
        The samples of each frame.
    """
    layout, name = frames[0].layout, frames[0].format.packed.name
    data = _stored(frames)
    if name == "u8":
        scaled = (data.astype(np.float32) - 128.0) / 128.0
    elif name in _FULL_SCALE:
        scaled = (data / _FULL_SCALE[name]).astype(np.float32)
    else:
        # Floats in a file may be anything. What is not finite, or so large that its power would not
        # be, makes the model's features NaN, and attention kernels can carry NaN to others.
        scaled = data.astype(np.float32, copy=False)
        if not (
            scaled.min(initial=0) >= -_MAX_AMPLITUDE and scaled.max(initial=0) <= _MAX_AMPLITUDE
        ):
            scaled = np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
            scaled = np.clip(scaled, -_MAX_AMPLITUDE, _MAX_AMPLITUDE, out=scaled)
    weights = None
    if len(scaled) > 2:
        weights = speaker_weights(tuple(channel.name for channel in layout.channels))
    if len(scaled) == 1:
        mixed = scaled[0]
    else:
        mixed = scaled.mean(axis=0) if weights is None else weights @ scaled
    mixed = np.asarray(mixed, np.float32)
    ends = list(accumulate(frame.samples for frame in frames))
    return [mixed[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _stored(frames: Sequence[AudioFrame]) -> npt.NDArray[Any]:
    """The samples of frames as they are stored, ``[channels, samples]``."""
    kind, channels = frames[0].format, frames[0].layout.nb_channels
    dtype = np.dtype(_DTYPES[kind.packed.name])
    if kind.is_planar:
        planes = [
            [np.frombuffer(memoryview(plane), dtype, frame.samples) for plane in frame.planes]
            for frame in frames
        ]
        return np.stack([np.concatenate(channel) for channel in zip(*planes, strict=True)])
    packed = [
        np.frombuffer(memoryview(frame.planes[0]), dtype, frame.samples * channels)
        for frame in frames
    ]
    joined: npt.NDArray[Any] = np.concatenate(packed)
    return joined.reshape(-1, channels).T


@lru_cache(maxsize=64)
def speaker_weights(speakers: tuple[str, ...]) -> npt.NDArray[np.float32] | None:
    """Weight of each channel, adding up to 1; None where the channels are to be averaged.

    Args:
        speakers: FFmpeg's name of each channel's speaker (``FL``, ``FC``, ``LFE``...).
    """
    if any(name in _UNNAMED or name.startswith(("UNK", "AMBI", "USR")) for name in speakers):
        return None
    weights = np.array([_WEIGHTS.get(name, _SURROUND) for name in speakers], np.float32)
    total = float(weights.sum())
    return weights / total if total else None

"""Stretches of a session as the media of vLLM's prompts, which grow with them.

What was made of a unit is kept and stays as it is: pixels, digests, sound. So a longer stretch has
the same segments and windows before its new unit, and caches hold all that was made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.live.prompt import Stretch, Unit
from vllm_mm_ext.media.audio.waveforms import HOP
from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.video.track_pieces import TrackPiece, piece_of

# A log-mel frame sees 200 samples to both sides of its middle: two frames before a unit suffice.
_CONTEXT = 2 * HOP
# What Whisper's transform keeps below the loudest value, in its own units (8 of log10, over 4).
_DYNAMIC = 2.0


class Sound(Protocol):
    """The sound of the units of one stretch."""

    def keep(self, count: int) -> None:
        """Forget all but the first units."""

    def add(self, samples: npt.NDArray[np.float32]) -> None:
        """Take the sound of the next unit; it may be empty."""

    def track(self) -> Waveform | None:
        """The sound of a video; None without any."""

    def items(self) -> list[Waveform]:
        """The audio items of sound without frames, one placeholder each."""


class Samples:
    """Sound for a model whose processor cuts windows itself, each on its own: one audio item.

    Args:
        rate: Sampling rate in Hz.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._ends = [0]
        self._buffer = np.empty(0, np.float32)

    def keep(self, count: int) -> None:
        """Forget all but the first units."""
        if count < len(self._ends) - 1:
            self._buffer = self._buffer[: self._ends[count]].copy()
        del self._ends[count + 1 :]

    def add(self, samples: npt.NDArray[np.float32]) -> None:
        """Take the sound of the next unit."""
        begin, end = self._ends[-1], self._ends[-1] + len(samples)
        self._buffer = with_room(self._buffer, begin, end)
        self._buffer[begin:end] = samples
        self._ends.append(end)

    def track(self) -> Waveform | None:
        """All samples."""
        samples = self._buffer[: self._ends[-1]]
        if not len(samples):
            return None
        return Waveform(samples, digest=_digest(samples), rate=self._rate)

    def items(self) -> list[Waveform]:
        """All samples, as one item."""
        track = self.track()
        return [] if track is None else [track]


@dataclass(frozen=True)
class _Heard:
    """The sound of a unit.

    Attributes:
        piece: Its features; None without sound.
        end: Its last samples, which the first features of the next unit see.
        loudest: Largest feature up to its end.
    """

    piece: TrackPiece | None
    end: npt.NDArray[np.float32]
    loudest: float


class Features:
    """Sound for a model whose log-mel transform sees a whole track: features unit by unit.

    Whisper's transform raises the quietest values to a fixed distance below the loudest of the
    track. Of a track that goes on the loudest is not known, so each unit goes by the loudest so
    far: its features depend on nothing that follows. For the same reason a unit's last frame does
    not see the 2.5 ms of sound that follow the unit. Otherwise features are those of the track.

    Args:
        rate: Sampling rate in Hz.
        transform: The family's log-mel spectrogram ``[bins, frames]`` of a waveform.
        least: Fewest samples of a unit; a shorter one goes on with silence.
    """

    def __init__(
        self, rate: int, transform: Callable[[Waveform], torch.Tensor], least: int
    ) -> None:
        self._rate = rate
        self._transform = transform
        self._least = least
        self._heard: list[_Heard] = []

    def keep(self, count: int) -> None:
        """Forget all but the first units."""
        del self._heard[count:]

    def add(self, samples: npt.NDArray[np.float32]) -> None:
        """Take the sound of the next unit."""
        last = self._heard[-1] if self._heard else _Heard(None, np.empty(0, np.float32), -np.inf)
        if not len(samples):
            self._heard.append(_Heard(None, last.end, last.loudest))
            return
        silence = np.zeros(max(0, self._least - len(samples)), np.float32)
        whole = np.concatenate([last.end, samples, silence])
        mel = self._transform(Waveform(whole, digest="", rate=self._rate))
        mel = mel[:, len(last.end) // HOP :]
        loudest = max(last.loudest, float(mel.max()))
        piece = piece_of(self._silent(1), mel.clamp_min(loudest - _DYNAMIC))
        self._heard.append(_Heard(piece, np.array(samples[-_CONTEXT:]), loudest))

    def track(self) -> Waveform | None:
        """A track of the right length that carries its features."""
        pieces = self._pieces()
        if not pieces:
            return None
        mel = torch.cat([piece.mel for piece in pieces], dim=1)
        digests = "|".join(str(piece.digest) for piece in pieces)
        track = TrackPiece(
            self._silent(mel.shape[1] * HOP),
            digest=str(blake3(digests.encode()).hexdigest()),
            rate=self._rate,
        )
        track.mel = mel
        return track

    def items(self) -> list[Waveform]:
        """An item for each unit."""
        return [*self._pieces()]

    def _pieces(self) -> list[TrackPiece]:
        return [one.piece for one in self._heard if one.piece is not None]

    def _silent(self, length: int) -> Waveform:
        """A waveform of this length that takes no memory; models hear the features."""
        zeros = np.broadcast_to(np.float32(0), (length,))
        return Waveform(zeros, digest="", rate=self._rate)


@dataclass(frozen=True)
class Media:
    """What stands in a prompt for a stretch.

    Attributes:
        video: Frames, perhaps with their sound, and vLLM's metadata; None without frames.
        sounds: Audio items of sound without frames.
    """

    video: tuple[SampledFrames, dict[str, Any]] | None
    sounds: Sequence[Waveform]


class GrowingStretch:
    """The media of one stretch, as long as it is at the moment.

    Args:
        unit_s: Seconds of a unit.
        reduction: The token reduction of its video.
        sound: Takes the sound; None for a model that hears nothing.
    """

    def __init__(self, unit_s: float, reduction: Reduction, sound: Sound | None) -> None:
        self._unit_s = unit_s
        self._reduction = reduction
        self._sound = sound
        self._units: tuple[Unit, ...] = ()
        self._frames = np.empty((0, 0, 0, 3), np.uint8)
        self._times: list[float] = []
        self._digests: list[bytes] = []
        self._made: Media | None = None

    def media(self, stretch: Stretch) -> Media:
        """The media of the units so far; those of units known before are not made again."""
        units = stretch.units
        same = 0
        while same < min(len(units), len(self._units)) and units[same] is self._units[same]:
            same += 1
        if self._made is None or same < len(units) or same < len(self._units):
            self._keep(same)
            for unit in units[same:]:
                self._add(unit)
            self._units = units
            self._made = self._make()
        return self._made

    def _keep(self, count: int) -> None:
        frames = sum(len(unit.frames) for unit in self._units[:count])
        if frames < len(self._times):
            # A prompt that is still being rendered may show the frames that give way.
            self._frames = self._frames[:frames].copy()
        del self._times[frames:], self._digests[frames:]
        if self._sound is not None:
            self._sound.keep(count)

    def _add(self, unit: Unit) -> None:
        if self._sound is not None:
            self._sound.add(unit.samples)
        begin, end = len(self._times), len(self._times) + len(unit.frames)
        if unit.frames:
            if not len(self._frames):  # The first frame says how large they are.
                self._frames = np.empty((0, *unit.frames[0].pixels.shape), np.uint8)
            self._frames = with_room(self._frames, begin, end)
        for at, frame in enumerate(unit.frames, begin):
            self._frames[at] = frame.pixels
            self._times.append(frame.time_s)
            self._digests.append(blake3(frame.pixels.tobytes()).digest())

    def _make(self) -> Media:
        if not self._times:
            return Media(None, self._sound.items() if self._sound is not None else [])
        track = None if self._sound is None else self._sound.track()
        whole = blake3(b"".join(self._digests))
        whole.update(repr((self._times, self._unit_s, self._reduction.key())).encode())
        whole.update(b"-" if track is None else str(track.digest).encode())
        frames = SampledFrames(
            self._frames[: len(self._times)],
            digest=str(whole.hexdigest()),
            times=tuple(self._times),
            audio=track,
            reduction=self._reduction,
            pinned=True,
            unit_s=self._unit_s,
        )
        frames.memo["frame_digests"] = tuple(self._digests)
        return Media((frames, _metadata(self._times)), [])


def with_room(buffer: npt.NDArray[Any], used: int, needed: int) -> npt.NDArray[Any]:
    """A buffer with room for so many rows, the used ones as before; grows by doubling.

    Views of a buffer that was too short stay as they are.
    """
    if needed <= len(buffer):
        return buffer
    larger = np.empty((max(needed, 2 * len(buffer)), *buffer.shape[1:]), buffer.dtype)
    larger[:used] = buffer[:used]
    return larger


def _digest(samples: npt.NDArray[np.float32]) -> str:
    return str(blake3(samples.tobytes()).hexdigest())


def _metadata(times: Sequence[float]) -> dict[str, Any]:
    """vLLM's metadata of frames at these times, in milliseconds; models go by the times."""
    at = [round(1000 * time) for time in times]
    gaps = [b - a for a, b in pairwise(at)]
    total = at[-1] + (gaps[-1] if gaps else 1000)
    return {
        "total_num_frames": max(total, len(times)),
        "fps": 1000.0,
        "duration": total / 1000,
        "video_backend": "mm_ext:live",
        "frames_indices": at,
        "do_sample_frames": False,
    }

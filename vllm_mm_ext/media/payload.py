"""Decoded media as arrays that also say where they come from.

vLLM hands decoded media from its loaders to its processors as bare arrays. The array classes here
pass through vLLM like any other array, and carry attributes for the plugin's own code: a digest, so
that vLLM's hasher need not read the pixels, and the true times and the sound of a video's frames.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction


class _Carrier(np.ndarray[Any, Any]):
    """An array with attributes that describe the whole array.

    A view, a slice or the result of arithmetic is other media, and so has none of the attributes.
    """

    digest: str | None

    def __array_finalize__(self, obj: object) -> None:
        self.digest = None

    def __array_wrap__(
        self, array: npt.NDArray[Any], context: Any = None, return_scalar: bool = False
    ) -> Any:
        # The result of arithmetic is not the media: NumPy gets a plain array or scalar.
        plain = np.asarray(array)
        return plain[()] if return_scalar else plain

    def __reduce__(self) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = tuple(super().__reduce__())
        carried = {k: v for k, v in self.__dict__.items() if k != "memo"}
        return reduced[0], reduced[1], (reduced[2], carried)

    def __setstate__(self, state: Any) -> None:
        array_state, attributes = state
        super().__setstate__(array_state)
        self.__dict__.update(attributes)


class Waveform(_Carrier):
    """A mono waveform with its identity.

    Args:
        samples: float32 ``[samples]``; the waveform shares their memory.
        digest: Identity of the source bytes and of all processing up to these samples.
        rate: Sampling rate in Hz.

    Attributes:
        digest: As given; None on an array derived from a waveform.
        rate: As given; None on an array derived from a waveform.

    Raises:
        ValueError: ``samples`` is not one-dimensional.
    """

    rate: int | None

    def __new__(cls, samples: npt.NDArray[np.float32], *, digest: str, rate: int) -> Self:
        if samples.ndim != 1:
            raise ValueError(f"a waveform has one dimension, got shape {samples.shape}")
        self = np.asarray(samples, dtype=np.float32).view(cls)
        self.digest = digest
        self.rate = rate
        return self

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.rate = None


class SampledFrames(_Carrier):
    """The frames of one video with their identity, their times and the video's sound.

    Args:
        frames: uint8 RGB ``[n, height, width, 3]``; the object shares their memory.
        digest: Identity of the source bytes, the frames chosen, their size, whether sound comes
            along, and ``reduction``.
        times: Presentation time of each frame in seconds from the start of the video, ascending.
            With None the model assumes its usual frame rate, as it does for any other array.
        audio: The whole audio track at the model's sampling rate, from the start of the video on;
            None for a video without sound.
        step: Seconds between the moments 0, ``step``, 2 ``step``... that the frames show; None
            where the frames were not sampled at such moments.
        reduction: How the number of the model's tokens for these frames is reduced.
        pinned: The frames have their final size: the model's processor must not resize them.
        unit_s: Seconds of a unit of a video that is still growing: no segment goes beyond the end
            of a unit. Needs ``times``; every unit has a frame. None for a whole video.

    Attributes:
        digest, times, audio, step, reduction, pinned, unit_s: As given; None, None, None, None, no
            reduction, False and None on an array derived from sampled frames.
        memo: Values that were computed from the frames, kept for later requests: all reductions of
            the frames share one dictionary; a derived or unpickled array has an empty one. No value
            may hold the frames or a view of them: Python's garbage collector does not look into
            NumPy arrays, so frames to which their own memo leads back are never freed.

    Raises:
        ValueError: ``frames`` does not have four dimensions, or ``times`` not one per frame.
    """

    times: tuple[float, ...] | None
    audio: Waveform | None
    step: float | None
    reduction: Reduction
    pinned: bool
    unit_s: float | None
    memo: dict[Any, Any]

    def __new__(
        cls,
        frames: npt.NDArray[np.uint8],
        *,
        digest: str,
        times: tuple[float, ...] | None = None,
        audio: Waveform | None = None,
        step: float | None = None,
        reduction: Reduction = NO_REDUCTION,
        pinned: bool = False,
        unit_s: float | None = None,
    ) -> Self:
        if frames.ndim != 4:
            raise ValueError(f"frames have four dimensions, got shape {frames.shape}")
        if times is not None and len(times) != len(frames):
            raise ValueError(f"{len(frames)} frames cannot have {len(times)} times")
        self = np.asarray(frames).view(cls)
        self.digest = digest
        self.times = times
        self.audio = audio
        self.step = step
        self.reduction = reduction
        self.pinned = pinned
        self.unit_s = unit_s
        return self

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.times = None
        self.audio = None
        self.step = None
        self.reduction = NO_REDUCTION
        self.pinned = False
        self.unit_s = None
        self.memo = {}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.memo = {}

    def frame_digests(self) -> tuple[bytes, ...]:
        """BLAKE3 of each frame's bytes, 32 bytes each; computed once and remembered."""
        made: tuple[bytes, ...] | None = self.memo.get("frame_digests")
        if made is None:
            pixels = np.ascontiguousarray(np.asarray(self))
            made = tuple(blake3(frame.reshape(-1)).digest() for frame in pixels)
            self.memo["frame_digests"] = made
        return made

    def reduced(self, reduction: Reduction) -> SampledFrames:
        """The same frames and sound with a token reduction; they share pixels and ``memo``.

        Args:
            reduction: The token reduction; these frames themselves must have none.
        """
        if reduction == self.reduction:
            return self
        made = SampledFrames(
            np.asarray(self),
            digest=reduced_digest(str(self.digest), reduction),
            times=self.times,
            audio=self.audio,
            step=self.step,
            reduction=reduction,
            pinned=self.pinned,
            unit_s=self.unit_s,
        )
        made.memo = self.memo
        return made


def reduced_digest(digest: str, reduction: Reduction) -> str:
    """The digest of frames with a token reduction.

    Args:
        digest: Of the same frames without one.
        reduction: The token reduction.
    """
    if reduction == NO_REDUCTION:
        return digest
    return str(blake3(f"{digest}|{reduction.key()}".encode()).hexdigest())


def known_digest(obj: object) -> str | None:
    """The digest that an array carries; None for an array whose contents must be hashed."""
    return obj.digest if isinstance(obj, _Carrier) else None

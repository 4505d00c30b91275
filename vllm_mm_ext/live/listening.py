"""Turns the audio bytes of a session into samples for the model, and speech probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_mm_ext.errors import UnreadableMediaError
from vllm_mm_ext.live.audio_format import AudioFormat
from vllm_mm_ext.live.resampling import Samples, StreamResampler
from vllm_mm_ext.live.voice import VOICE_RATE, VOICE_WINDOW, Voice


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Sound that follows the last piece's.

    Attributes:
        position: Where it begins, in samples at the model's rate since the session began.
        samples: float32 mono at the model's rate; may be empty.
        window: The window of the speech detector that ends with this piece; None: none does.
    """

    position: int
    samples: Samples
    window: VoiceWindow | None


@dataclass(frozen=True, slots=True)
class VoiceWindow:
    """What the speech detector says of a window.

    Attributes:
        start, end: Where the window lies, in samples at the model's rate since the session began.
        probability: That it holds speech.
    """

    start: int
    end: int
    probability: float


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """What one append, or a flush, adds to a session's sound.

    Attributes:
        pieces: In order, without gaps; a piece ends where a window of the speech detector does.
        received: The sound that the client has sent since the session began, in samples at the
            model's rate. The resampler still holds the last milliseconds of it.
    """

    pieces: tuple[Piece, ...]
    received: int


class Listener:
    """Decodes and resamples one session's sound, and asks the speech detector about it.

    For one thread at a time.

    Args:
        audio_rate: The model's rate in Hz.
        audio_format: The session's input format.
    """

    def __init__(self, audio_rate: int, audio_format: AudioFormat) -> None:
        self._rate = audio_rate
        self._format = audio_format
        self._begun = b""
        self._sound = StreamResampler(audio_format.rate, audio_rate)
        # What was received before the present format, in samples at the model's rate.
        self._before = 0
        self._voice: Voice | None = None
        self._windows = _Windows(audio_rate, audio_format.rate, 0)

    @property
    def voice(self) -> Voice | None:
        """The speech detector in use."""
        return self._voice

    @property
    def audio_format(self) -> AudioFormat:
        """The input format."""
        return self._format

    def hear(self, audio: bytes) -> Heard:
        """Take the bytes of an append.

        Args:
            audio: Any number of bytes; a sample that they begin ends with the next bytes.
        """
        audio = self._begun + audio
        whole = len(audio) - len(audio) % self._format.sample_bytes
        self._begun = audio[whole:]
        samples = self._format.samples(audio[:whole])
        position = self._position()
        resampled = self._sound.push(samples)
        windows: list[VoiceWindow] = []
        if self._voice is not None:
            windows = self._windows.judge(self._voice, samples, resampled)
        return self._heard(position, resampled, windows)

    def flush(self) -> Heard:
        """What the resampler held back, for a client's commit; a begun sample is forgotten.

        The next sound is a new stream to the resampler. The speech detector goes on with it as if
        there had been no commit.
        """
        self._begun = b""
        position = self._position()
        resampled = self._sound.flush()
        windows: list[VoiceWindow] = []
        if self._voice is not None and self._windows.shared:
            windows = self._windows.judge(self._voice, resampled, resampled)
        return self._heard(position, resampled, windows)

    def clear(self) -> None:
        """Forget what was held back, begun samples too; the next sound is a new stream."""
        self._begun = b""
        self._sound.drop()
        if self._voice is not None:
            self._voice.reset()
        self._windows = _Windows(self._rate, self._format.rate, self._position())

    def use_format(self, audio_format: AudioFormat) -> None:
        """Take bytes in another format from now on; what was held back is forgotten.

        Args:
            audio_format: The format; nothing happens where it is in use.
        """
        if audio_format is self._format:
            return
        self._sound.drop()
        self._before = self._position()
        self._format = audio_format
        self._sound = StreamResampler(audio_format.rate, self._rate)
        self.clear()

    def use_voice(self, voice: Voice | None) -> Voice | None:
        """Ask this speech detector from now on, or none; return the one used before.

        Args:
            voice: At the start of a stream.
        """
        before, self._voice = self._voice, voice
        self._windows = _Windows(self._rate, self._format.rate, self._position())
        return before

    def _position(self) -> int:
        return self._before + self._sound.given

    def _heard(self, position: int, samples: Samples, windows: list[VoiceWindow]) -> Heard:
        pieces = []
        for window in windows:
            # At other rates than the detector's, a window can end a little before or after what the
            # resampler has given.
            cut = min(max(window.end - position, 0), len(samples))
            pieces.append(Piece(position, samples[:cut], window))
            position, samples = position + cut, samples[cut:]
        if len(samples):
            pieces.append(Piece(position, samples, None))
        return Heard(tuple(pieces), self._before + self._sound.taken)


class _Windows:
    """Cuts sound into the windows of the speech detector.

    Args:
        audio_rate: The model's rate in Hz; the detector listens to the model's samples if it is the
            detector's rate too.
        input_rate: That of the session's sound.
        position: Where the first window begins, in samples at the model's rate.
    """

    def __init__(self, audio_rate: int, input_rate: int, position: int) -> None:
        self.shared = audio_rate == VOICE_RATE
        self._resampler = StreamResampler(input_rate, VOICE_RATE)
        self._rate = audio_rate
        self._position = position
        self._window = np.zeros(VOICE_WINDOW, np.float32)
        self._filled = 0
        self._judged = 0

    def judge(self, voice: Voice, samples: Samples, resampled: Samples) -> list[VoiceWindow]:
        """Ask about all windows that the next sound completes.

        Args:
            voice: The detector.
            samples: The sound at the session's rate.
            resampled: The sound at the model's rate.
        """
        heard = resampled if self.shared else self._resampler.push(samples)
        windows = []
        while len(heard):
            taken = heard[: VOICE_WINDOW - self._filled]
            self._window[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            heard = heard[len(taken) :]
            if self._filled == VOICE_WINDOW:
                self._filled = 0
                probability = voice.probability(self._window)
                start, self._judged = self._judged, self._judged + VOICE_WINDOW
                windows.append(VoiceWindow(self._at(start), self._at(self._judged), probability))
        return windows

    def _at(self, samples: int) -> int:
        return self._position + samples * self._rate // VOICE_RATE


def whole_sound(audio: bytes, audio_format: AudioFormat, audio_rate: int) -> Samples:
    """The samples of an item's ``input_audio``, at the model's rate.

    Args:
        audio: All bytes, in the session's input format.
        audio_format: That format.
        audio_rate: The model's rate in Hz.

    Raises:
        UnreadableMediaError: There is no sound, or the bytes end within a sample.
    """
    if not audio or len(audio) % audio_format.sample_bytes:
        raise UnreadableMediaError(
            f"The audio has {len(audio)} bytes; {audio_format.value} takes a multiple of "
            f"{audio_format.sample_bytes}, and at least one sample.",
            parameter="audio",
        )
    resampler = StreamResampler(audio_format.rate, audio_rate)
    samples = resampler.push(audio_format.samples(audio))
    return np.concatenate([samples, resampler.flush()])

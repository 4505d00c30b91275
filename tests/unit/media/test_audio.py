"""Waveforms: resampling and log-mel equal the reference implementations."""

from __future__ import annotations

import copy
import math
import pickle
import resource

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from vllm.multimodal.audio import AudioResampler

from vllm_mm_ext.media.audio import waveforms as audio
from vllm_mm_ext.media.payload import SampledFrames, Waveform, known_digest


def tones(num_samples: int, rate: int = audio.MODEL_RATE, seed: int = 0) -> np.ndarray:
    """Decaying tones over faint noise: loud and quiet parts, so that the floor matters."""
    rng = np.random.default_rng(seed)
    t = np.arange(num_samples) / rate
    wave = np.sin(2 * np.pi * 440 * t) * np.exp(-t) + 0.3 * np.sin(2 * np.pi * 3000 * t * (t % 1))
    return (wave + 1e-4 * rng.standard_normal(num_samples)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("num_samples", [1, 777, 48001])
def test_resampling_equals_vllms_own(rate, num_samples):
    wave = tones(num_samples, rate)
    expected = AudioResampler(target_sr=audio.MODEL_RATE).resample(wave, orig_sr=rate)
    assert np.array_equal(audio.resample(wave, rate), expected)


def test_resampling_gives_back_a_waveform_already_at_the_rate():
    wave = Waveform(tones(100), digest="d", rate=16000)
    assert audio.resample(wave, 16000) is wave


@pytest.mark.parametrize("rate", [8001, 44_101, 191_999])
def test_odd_rates_are_resampled_without_a_filter_bank_of_gigabytes(rate):
    seconds = 0.5
    moments = np.arange(int(seconds * rate)) / rate
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    actual = audio.resample(np.sin(2 * np.pi * 440 * moments).astype(np.float32), rate)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert len(actual) == math.ceil(len(moments) * audio.MODEL_RATE / rate)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(actual)) / audio.MODEL_RATE)
    middle = slice(200, -200)
    np.testing.assert_allclose(actual[middle], expected[middle], atol=0.01)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 400, 5000, 16000, 480_000, 480_001])
@pytest.mark.parametrize("pad_to", ["clip", "window"])
def test_log_mel_equals_transformers(n_mels, num_samples, pad_to):
    wave = tones(num_samples)
    window = audio.WINDOW_S * audio.MODEL_RATE
    padded = -(-num_samples // window) * window
    if pad_to == "clip":  # so that even a clip of whole windows has silence behind it
        padded += window
    reference = WhisperFeatureExtractor(feature_size=n_mels)(
        wave,
        sampling_rate=audio.MODEL_RATE,
        max_length=padded,
        return_attention_mask=True,
        return_tensors="np",
    )
    expected = reference["input_features"][0]
    if pad_to == "clip":
        expected = expected[:, reference["attention_mask"][0].astype(bool)]
    actual = audio.log_mel(wave, n_mels=n_mels, pad_to=pad_to)
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_log_mel_pads_to_a_given_number_of_samples_as_transformers():
    wave = tones(4321)
    reference = WhisperFeatureExtractor(feature_size=80)(
        wave, sampling_rate=16000, max_length=8000, return_tensors="np"
    )
    actual = audio.log_mel(wave, n_mels=80, pad_to=8000)
    np.testing.assert_allclose(actual, reference["input_features"][0], atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 1599, 1600, 1601, 31_999, 50_000])
def test_frames_of_a_clip_do_not_depend_on_the_padding(num_samples):
    wave = tones(num_samples)
    own = audio.log_mel(wave, pad_to="clip")
    assert own.shape[1] == audio.num_mel_frames(num_samples)
    np.testing.assert_allclose(
        own, audio.log_mel(wave, pad_to="window")[:, : own.shape[1]], atol=1e-5
    )


def test_the_floor_is_that_of_the_whole_clip_in_every_window():
    wave = np.concatenate([tones(480_000), 1e-4 * tones(480_000)])
    first, second = audio.windows(audio.log_mel(wave))
    assert first.shape[1] == second.shape[1] == 3000
    assert second.min() == first.min() == pytest.approx(first.max() - 2.0, abs=1e-5)
    # On its own the quiet half would be floored relative to itself.
    assert audio.log_mel(wave[480_000:]).min() < second.min()


def test_mean_variance_normalisation_is_per_bin_over_the_clips_own_frames():
    own = audio.log_mel(tones(40_000), normalization="mean_variance")
    np.testing.assert_allclose(own.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(own.std(axis=1), 1, atol=1e-3)
    padded = audio.log_mel(tones(40_000), normalization="mean_variance", pad_to="window")
    np.testing.assert_allclose(padded[:, : own.shape[1]], own, atol=1e-3)


def test_log_mel_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one sample"):
        audio.log_mel(np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="pad_to=100"):
        audio.log_mel(tones(101), pad_to=100)


def frames_with_sound() -> SampledFrames:
    sound = Waveform(tones(160), digest="sound", rate=16000)
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    return SampledFrames(pixels, digest="pixels", times=(0.0, 0.5), audio=sound)


@pytest.mark.parametrize("derive", [lambda a: a[:1], lambda a: a + 1, np.copy, lambda a: a.view()])
def test_an_array_derived_from_media_does_not_claim_its_identity(derive):
    frames = frames_with_sound()
    for derived in (derive(frames), derive(frames.audio)):
        assert known_digest(derived) is None
        assert getattr(derived, "times", None) is None
        assert getattr(derived, "audio", None) is None
        assert getattr(derived, "rate", None) is None
    assert known_digest(frames) == "pixels"
    assert known_digest(frames.audio) == "sound"


def test_media_arrays_survive_pickling():
    again = pickle.loads(pickle.dumps(frames_with_sound()))
    assert np.array_equal(again, frames_with_sound())
    assert (again.digest, again.times) == ("pixels", (0.0, 0.5))
    assert (again.audio.digest, again.audio.rate) == ("sound", 16000)
    assert copy.deepcopy(again).digest is None


def test_plain_arrays_have_no_known_digest():
    assert known_digest(np.zeros(3)) is None
    assert known_digest("text") is None


def test_media_arrays_share_memory_and_check_their_shape():
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    assert np.shares_memory(SampledFrames(pixels, digest="d"), pixels)
    with pytest.raises(ValueError, match="four dimensions"):
        SampledFrames(pixels[0], digest="d")
    with pytest.raises(ValueError, match="2 frames cannot have 3 times"):
        SampledFrames(pixels, digest="d", times=(0.0, 1.0, 2.0))
    with pytest.raises(ValueError, match="one dimension"):
        Waveform(np.zeros((2, 3), np.float32), digest="d", rate=16000)
